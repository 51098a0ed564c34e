"use strict";
const list = document.getElementById("clips");
const order = document.getElementById("order");
const show = document.getElementById("show");
const find = document.getElementById("find");
const count = document.getElementById("count");

function arrange() {
  const items = [...list.children];
  const number = (item, key) => Number(item.dataset[key]);
  const [key, direction] = order.value.split(" ");
  items.sort((a, b) => (number(a, key) - number(b, key)) * Number(direction) || number(a, "index") - number(b, "index"));
  const wanted = find.value.trim().toLowerCase();
  let shown = 0;
  for (const item of items) {
    const wer = number(item, "wer");
    const keep = show.value === "all" || (show.value === "wrong" ? wer > 0 : show.value === "right" ? wer === 0 : wer >= 0.5);
    item.hidden = !(keep && item.textContent.toLowerCase().includes(wanted));
    shown += item.hidden ? 0 : 1;
  }
  list.append(...items);
  count.textContent = `${shown} of ${items.length} clips`;
}
for (const control of [order, show, find]) control.addEventListener("input", arrange);
arrange();

const tooltip = document.getElementById("tooltip");
for (const chart of document.querySelectorAll("svg.hover")) {
  const points = JSON.parse(chart.dataset.points);
  chart.addEventListener("pointermove", (event) => {
    const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(chart.getScreenCTM().inverse());
    let best = null;
    for (const point of points) {
      const distance = Math.abs(point[0] - place.x) + Math.abs(point[1] - place.y) / 4;
      if (best === null || distance < best.distance) best = { distance, text: point[2] };
    }
    if (!best) return;
    tooltip.textContent = best.text;
    tooltip.style.display = "block";
    tooltip.style.left = `${Math.max(4, Math.min(event.clientX + 12, window.innerWidth - tooltip.offsetWidth - 4))}px`;
    tooltip.style.top = `${event.clientY + 14}px`;
  });
  chart.addEventListener("pointerleave", () => { tooltip.style.display = "none"; });
}

document.addEventListener("play", (event) => {
  for (const other of document.querySelectorAll("audio")) if (other !== event.target) other.pause();
}, true);
