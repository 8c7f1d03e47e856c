"use strict";
/* Draws all, and again when the window or the colours change. */
async function main() {
  drawAll();
  let drawnAt = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== drawnAt) { drawnAt = innerWidth; drawAll(); } });
  const views = [...document.querySelectorAll("script.view-data")].map((node) => JSON.parse(node.textContent));
  let view = null;
  if (views.length) { view = new TokenView(document.getElementById("token-view"), views); await view.start(); }
  dark.addEventListener("change", () => { drawAll(); if (view) { view.painted = null; view.thumbnails(); view.render(); } });
  const download = document.getElementById("download");
  download.hidden = false;
  download.addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([document.getElementById("results").textContent], { type: "application/json" }));
    link.download = "results.json";
    link.click();
  });
  document.body.dataset.ready = "1";
}
main();
