// Numbers for people, and small helpers that build the page. Text is only ever set as text.

export const count = (n) => n.toLocaleString("en-US");

export function bytes(n) {
  const units = ["B", "KB", "MB", "GB", "TB"];
  let at = 0;
  while (n >= 999.5 && at < units.length - 1) {
    n /= 1000;
    at += 1;
  }
  return `${n >= 100 || at === 0 ? Math.round(n) : n.toFixed(1)} ${units[at]}`;
}

export function short(n) {
  if (n < 1000) return `${n}`;
  if (n < 999500) return `${n < 99500 ? (n / 1000).toFixed(1) : Math.round(n / 1000)}k`;
  return `${(n / 1e6).toFixed(1)}M`;
}

export function seconds(s) {
  const size = Math.abs(s);
  if (size < 0.0995) return `${Math.round(s * 1000)} ms`;
  if (size < 9.95) return `${s.toFixed(1)} s`;
  if (size < 120) return `${Math.round(s)} s`;
  if (size < 7200) return `${Math.round(s / 60)} min`;
  return `${Math.round(s / 3600)} h`;
}

const ruler = document.createElement("canvas").getContext("2d");
const family = getComputedStyle(document.body).fontFamily;

// Cut so that it fits so many pixels in a font like "600 11px"; "" if hardly anything would be left.
export function fitted(text, width, font = "11px") {
  ruler.font = `${font} ${family}`;
  if (ruler.measureText(text).width <= width) return text;
  let most = text.length - 1;
  while (most > 2 && ruler.measureText(`${text.slice(0, most)}…`).width > width) most -= 1;
  return most > 2 ? `${text.slice(0, most)}…` : "";
}

// The server notes uses to within a second.
export const ago = (s) => (s < 1.5 ? "just now" : `${seconds(s)} ago`);

export function element(kind, attributes = {}, ...children) {
  const made = document.createElement(kind);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children.filter((child) => child !== null));
  return made;
}

export function swatch(colour, name) {
  const box = element("span", { class: "swatch" });
  box.style.background = colour;
  return element("span", {}, box, name);
}

export function showEmpty(section, sentence) {
  const empty = document.querySelector(`${section} .empty`);
  empty.hidden = !sentence;
  empty.textContent = sentence;
}

export function tipOn(selection, text) {
  const tip = document.getElementById("tip");
  const show = (event, d) => {
    tip.textContent = text(d);
    tip.hidden = false;
    const { clientX: x, clientY: y } = event;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.min(x + 14, window.innerWidth - width - 6)}px`;
    tip.style.top = `${Math.min(y + 14, window.innerHeight - height - 6)}px`;
  };
  return selection
    .on("pointerenter pointermove", show)
    .on("pointerleave", () => {
      tip.hidden = true;
    });
}
