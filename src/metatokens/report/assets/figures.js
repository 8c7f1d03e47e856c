"use strict";
/* What the nearest mark of a chart stands for, or what a word means, beside the pointer. */
const REACH = 24; /* pixels */

function showTips() {
  const hover = document.getElementById("hover");
  let near = null;

  function nearest(svg, event) {
    if (event.target.dataset.layer) return event.target;
    let best = null, least = REACH;
    for (const mark of svg.querySelectorAll("use[data-tip], circle[data-tip]")) {
      const box = mark.getBoundingClientRect();
      const distance = Math.hypot(event.clientX - (box.left + box.right) / 2, event.clientY - (box.top + box.bottom) / 2);
      if (distance < least) [best, least] = [mark, distance];
    }
    return best;
  }

  function show(event) {
    const svg = event.target.closest?.("figure svg");
    const mark = event.target.closest?.("[data-meaning]") ?? (svg ? nearest(svg, event) : null);
    if (mark === near) return;
    near = mark;
    hover.hidden = mark === null;
    if (!mark) return;
    hover.textContent = mark.dataset.meaning ?? mark.dataset.tip;
    const box = mark.getBoundingClientRect(), { clientWidth } = document.documentElement;
    const left = Math.max(4, Math.min(box.right + 8, clientWidth - hover.offsetWidth - 4));
    const above = box.top - hover.offsetHeight - 8;
    hover.style.left = `${left + scrollX}px`;
    hover.style.top = `${(above > 0 ? above : box.bottom + 8) + scrollY}px`;
  }

  addEventListener("pointermove", show);
  addEventListener("pointerdown", show);
  addEventListener("focusin", show);
}
