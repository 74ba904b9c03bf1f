"""The HTTP server: OpenAI's, Anthropic's and Ollama's APIs, with keys, a ledger and a chat page."""
