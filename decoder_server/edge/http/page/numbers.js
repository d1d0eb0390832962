// Numbers with as many digits as tell candidates apart.

// The fewest decimals, from `least` up, at which no two different numbers look alike. Nine hold every float32 below 1.
function decimals(values, least) {
  const different = [...new Set(values)];
  for (let places = least; places < 9; places++) {
    if (new Set(different.map((one) => one.toFixed(places))).size === different.length) return places;
  }
  return 9;
}

// Margins of one list: +1.28.
export function margins(values) {
  const places = decimals(values, 2);
  return (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(places);
}

// Scores of one list. One below 1 never reads 1, nor one above 0 as 0: a tiny one has an exponent.
export function scores(values) {
  const tiny = 1e-6;
  const places = decimals([0, 1, ...values.filter((one) => one >= tiny)], 3);
  return (value) => (value > 0 && value < tiny ? value.toExponential(3) : value.toFixed(places));
}

export const milliseconds = (seconds) => `${(seconds * 1000).toFixed(1)} ms`;
export const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
