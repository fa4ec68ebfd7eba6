// What must not happen on the page: text that is cut off by what is around it, or lies on another.
const wrong = [];
const page = document.documentElement;
if (page.scrollWidth > window.innerWidth || page.scrollHeight > window.innerHeight)
  wrong.push(`the page is ${page.scrollWidth} x ${page.scrollHeight}`);
const inside = (inner, outer) => inner.left >= outer.left - 1 && inner.right <= outer.right + 1
  && inner.top >= outer.top - 1 && inner.bottom <= outer.bottom + 1;
for (const section of document.querySelectorAll("section")) {
  const frame = section.getBoundingClientRect();
  if (frame.right > window.innerWidth + 1 || frame.bottom > window.innerHeight + 1)
    wrong.push(`${section.id} leaves the window`);
  for (const text of section.querySelectorAll("svg text")) {
    const box = text.getBoundingClientRect();
    if (text.textContent && !inside(box, frame)) wrong.push(`${section.id}: "${text.textContent}" leaves it`);
  }
}
for (const cell of document.querySelectorAll("g.cell")) {
  const frame = cell.querySelector("rect.body").getBoundingClientRect();
  const squares = cell.querySelector(".where").getBoundingClientRect();
  for (const text of cell.querySelectorAll("text")) {
    const box = text.getBoundingClientRect();
    if (!text.textContent) continue;
    if (box.right > frame.right + 1) wrong.push(`"${text.textContent}" leaves its prefix`);
    if (squares.width && text.parentNode === cell && box.right > squares.left + 1
        && box.bottom > squares.top && box.top < squares.bottom)
      wrong.push(`"${text.textContent}" lies on its squares`);
  }
}
for (const svg of document.querySelectorAll("#queue svg, #tiers svg, #history svg")) {
  const texts = [...svg.querySelectorAll("text")].filter((t) => t.textContent).map((t) => [t.textContent, t.getBoundingClientRect()]);
  for (const [i, [one, a]] of texts.entries()) for (const [other, b] of texts.slice(i + 1)) {
    if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2)
      wrong.push(`"${one}" lies on "${other}"`);
  }
}
return wrong;
