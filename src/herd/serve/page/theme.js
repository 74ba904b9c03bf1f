// Before the first paint: the theme that was chosen, if any, and whether the list of chats is hidden.
for (const name of ["theme", "side"]) {
  const value = localStorage.getItem(`herd.${name}`);
  if (value) document.documentElement.dataset[name] = value;
}
