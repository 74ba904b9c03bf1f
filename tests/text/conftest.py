"""Tokenizers for this room's tests: Meta's real one where the data is, and a small one trained on committed text."""

import pytest
from hypothesis import settings

from herd.text import Tokenizer

settings.register_profile("no clock", deadline=None)  # how long an example takes is the machine's affair
settings.load_profile("no clock")

SAMPLE = (
    "The quick brown fox doesn't jump over 12345 lazy dogs. It's what they'd say, we've heard; I'll see.\n"
    "Der schnelle braune Fuchs springt über den faulen Hund. Wie schön! Größe, Straße, Übung.\n"
    "Le renard brun saute par-dessus le chien paresseux ; ça va où ? L'été, là-bas.\n"
    "El zorro marrón salta sobre el perro perezoso. ¿Cuántos años tienes? ¡Mañana!\n"
    "La volpe marrone salta sopra il cane pigro. Perché è così?\n"
    "A raposa marrom pula sobre o cão preguiçoso. Não há coração sem razão.\n"
    "तेज़ भूरी लोमड़ी आलसी कुत्ते के ऊपर कूदती है। नमस्ते दुनिया, आप कैसे हैं?\n"
    "สุนัขจิ้งจอกสีน้ำตาลกระโดดข้ามสุนัขขี้เกียจ สวัสดีชาวโลก\n"
    "素早い茶色の狐は怠け者の犬を飛び越える。こんにちは、世界！カタカナ。\n"
    "敏捷的棕色狐狸跳过懒狗。你好，世界。\n"
    "def area(width: float, height: float) -> float:\n    return width * height  # 3.14159\n\n\n"
    'print({"name": "calculator", "parameters": {"expression": "2 + 2"}})\n'
)


@pytest.fixture(scope="session")
def sample() -> str:
    return SAMPLE


@pytest.fixture(scope="session")
def small() -> Tokenizer:
    return Tokenizer.train([line + "\n" for line in SAMPLE.split("\n")] * 3, 900)


@pytest.fixture(scope="session")
def meta(real_data) -> Tokenizer:
    return Tokenizer.from_file(real_data("llama3_tokenizer") / "tokenizer.model")
