// Colours that are told apart without seeing red and green (Okabe and Ito), and what they stand for.

export const TIERS = {
  device: { colour: "#0072B2", name: "device" },
  host: { colour: "#E69F00", name: "host" },
  disk: { colour: "#CC79A7", name: "disk" },
  store: { colour: "#009E73", name: "store" },
};
export const NOWHERE = { colour: "#8a93a3", name: "nowhere now" };
export const COMPUTED = { colour: "#8a93a3", name: "computed" };
export const SEVERAL = "#6b7280";

const GROUPS = [
  "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B5A900", "#7b61c4", "#8c6d46",
];

export const tierName = (tier) => TIERS[tier]?.name ?? tier;

// A colour for each name, the same as long as the page is open.
export class Groups {
  #colours = new Map();

  colour(name) {
    if (!this.#colours.has(name)) {
      this.#colours.set(name, GROUPS[this.#colours.size % GROUPS.length]);
    }
    return this.#colours.get(name);
  }

  clear() {
    this.#colours.clear();
  }
}

// Dark or light text, whichever is read better on a colour.
export function textOn(colour) {
  const { r, g, b } = d3.rgb(colour);
  const linear = [r, g, b].map((v) => (v / 255 <= 0.03928 ? v / 3294.6 : ((v / 255 + 0.055) / 1.055) ** 2.4));
  const luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  return luminance > 0.22 ? "#10131a" : "#ffffff";
}

// Recently used is bright: a second ago to an hour ago, by its logarithm.
export function ageColour(seconds) {
  const at = Math.min(1, Math.log10(1 + Math.max(0, seconds)) / Math.log10(3601));
  return d3.interpolateCividis(1 - at);
}
