// What a page gets wrong: elements wider than the window, and texts that do not stand out from what is behind them.
() => {
  const numbers = color => color.match(/[\d.]+/g).map(Number);
  const linear = value => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const luminance = color => {
    const [red, green, blue] = numbers(color).map(value => linear(value / 255));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if (numbers(color)[3] !== 0) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const contrast = element => {
    const [a, b] = [luminance(getComputedStyle(element).color), luminance(behind(element))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  };
  const name = element => `${element.tagName}.${element.className}`;
  const room = document.documentElement.clientWidth + 1;
  const all = [...document.querySelectorAll("body *")].filter(element => !element.closest("svg"));
  const texts = [...document.querySelectorAll("h1, h2, h3, h4, p, a, td, th, pre, dt, dd, summary, footer")];
  return {
    wide: all.filter(e => !e.closest(".scroll") && e.getBoundingClientRect().right > room).map(name),
    faint: texts.filter(e => e.textContent.trim() && contrast(e) < 4.5).map(name),
    scrolls: document.documentElement.scrollWidth > room,
    smallest: Math.min(...[...document.querySelectorAll("svg.chart")].map(
      svg => 12 * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width)),
    background: getComputedStyle(document.body).backgroundColor,
  };
}
