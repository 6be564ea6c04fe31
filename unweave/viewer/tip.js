// One tooltip for the whole page: for [data-tip] under the pointer or the focus, and for whoever calls showTip.
import { $ } from "./dom.js";

export function showTip(text, x, y) {
  const tip = $("tip");
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = Math.min(x + 14, document.documentElement.clientWidth - box.width - 8);
  const top = y + 18 + box.height > innerHeight ? y - box.height - 10 : y + 18;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${Math.max(8, top)}px`;
}
export const hideTip = () => { $("tip").hidden = true; };

export function startTips() {
  const over = (event) => {
    const owner = event.target.closest?.("[data-tip]");
    if (!owner) return hideTip();
    const box = owner.getBoundingClientRect();
    showTip(owner.getAttribute("data-tip"), event.clientX ?? box.left, event.clientY ?? box.bottom - 14);
  };
  document.addEventListener("pointerover", (event) => { if (!event.target.closest?.("[data-own-tip]")) over(event); });
  document.addEventListener("focusin", (event) => { if (event.target.matches?.("[data-tip]:focus-visible")) over(event); });
  document.addEventListener("focusout", hideTip);
  document.addEventListener("scroll", hideTip, { capture: true, passive: true });
}
