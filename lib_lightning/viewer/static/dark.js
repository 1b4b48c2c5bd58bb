// Whether the page is dark: as TensorBoard is set in its tab, and as the browser prefers elsewhere.

import {boardWindow} from "./place.js";

const PREFERRED = "(prefers-color-scheme: dark)";

/** Calls `changed(dark)` now and at every change; returns a function that ends this. */
export function watchDark(changed) {
  const board = boardWindow()?.document.body;
  const preferred = matchMedia(PREFERRED);
  const update = () => changed(board ? board.classList.contains("dark-mode") : preferred.matches);
  const observer = new MutationObserver(update);
  if (board) observer.observe(board, {attributes: true, attributeFilter: ["class"]});
  else preferred.addEventListener("change", update);
  update();
  return () => {
    observer.disconnect();
    preferred.removeEventListener("change", update);
  };
}
