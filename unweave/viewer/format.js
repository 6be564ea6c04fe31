// Numbers and hostile strings as text that a person can read.
export const known = (x) => typeof x === "number" && Number.isFinite(x);
const SUPERSCRIPT = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };

export function power(exponent) {
  return "10" + [...String(exponent)].map((c) => SUPERSCRIPT[c]).join("");
}
// three significant digits unless told otherwise
export function num(x, digits = 3) {
  if (!known(x)) return "n/a";
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size < 1e-4 || size >= 1e7) {
    const [head, exponent] = x.toExponential(Math.max(0, digits - 2)).split("e");
    return `${head}×${power(Number(exponent))}`.replace("-", "−");
  }
  return (size >= 10 ** digits ? Math.round(x).toLocaleString("en") : x.toPrecision(digits)).replace("-", "−");
}
export const count = (x) => (known(x) ? x.toLocaleString("en") : "n/a");
export const percent = (x, digits = 1) => (known(x) ? `${(100 * x).toFixed(digits)}%`.replace("-", "−") : "n/a");
// a share too small for one digit is not shown as none
export const share = (x) => (known(x) && x > 0 && x < 5e-4 ? `${num(100 * x, 2)}%` : percent(x));
export function large(x) {
  if (!known(x)) return "n/a";
  for (const [limit, unit] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) if (Math.abs(x) >= limit) return `${(x / limit).toPrecision(3)} ${unit}`;
  return String(x);
}

// Everything that cannot be seen, or that could reorder or join its neighbours, is spelled out.
const UNSEEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}\p{DI}\u2800]|(?! )\p{Zs}/u;
const SIGNS = { "\n": "⏎", "\r": "␍", "\t": "⇥" };
export const LONGEST = 400;

// text as pieces { text, mark }: marks stand for characters that cannot be seen; spaces only where asked
export function pieces(text, { spaces = false } = {}) {
  const all = [];
  const add = (piece, mark) => {
    const last = all[all.length - 1];
    if (last && !mark && !last.mark) last.text += piece;
    else all.push({ text: piece, mark });
  };
  const characters = [...String(text).slice(0, LONGEST)];
  for (const c of characters) {
    if (c === " ") add(spaces ? "␣" : " ", spaces);
    else if (SIGNS[c]) add(SIGNS[c], true);
    else if (UNSEEN.test(c)) add("U+" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0"), true);
    else add(c, false);
  }
  // a combining mark at the start would sit on whatever stands before the token
  if (characters.length && /\p{M}/u.test(characters[0])) all.unshift({ text: "◌", mark: false });
  if (String(text).length > LONGEST) add("…", true);
  return all;
}
export const plain = (text, options) => pieces(text, options).map((piece) => piece.text).join("");
// node names as short as they stay clear: blocks.3.attn.head.5 is 3.h5
export const short = (name) => plain(name).replace(/^blocks\.(\d+)\.attn\.head\.(\d+)$/, "$1.h$2").replace(/^blocks\.(\d+)\.mlp$/, "$1.mlp");
