// Runs before the first paint, so that a chosen theme does not flash.
"use strict";
(() => {
  let chosen = null;
  try {
    chosen = localStorage.getItem("darkroom-theme");
  } catch {
    // Storage is blocked: the system's theme it is.
  }
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
