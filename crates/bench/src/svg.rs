//! Speed and memory as horizontal bars, in SVG that reads on light and dark pages.

use std::fmt::Write;

use super::comparison::by_speed;
use super::results::{Measured, Results, ScenarioResult};
use terminal::human;

const WIDTH: f64 = 960.0;
/// The left edges of the bars of the two panels.
const SPEED: (f64, f64) = (250.0, 560.0);
const MEMORY: (f64, f64) = (690.0, 870.0);
const ROW: f64 = 26.0;
const BAR: f64 = 14.0;

/// A bar: its length, its whisker and its label.
struct Bar {
    value: f64,
    whisker: Option<(f64, f64)>,
    label: String,
}

/// A picture of every scenario with several contenders; `None` without such a scenario.
pub(super) fn plot(results: &Results) -> Option<String> {
    let comparisons = results.scenarios.iter();
    let comparisons: Vec<_> = comparisons.filter(|it| it.contenders.len() > 1).collect();
    if comparisons.is_empty() {
        return None;
    }
    let mut body = String::new();
    let mut y = 30.0;
    for result in comparisons {
        y = scenario(&mut body, result, y);
    }
    Some(document(&body, y))
}

fn document(body: &str, height: f64) -> String {
    // Colours of the page's own if it is embedded; both have enough contrast on white and on black.
    format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" font-family="system-ui, sans-serif" font-size="13">
<style>
  .page {{ fill: #ffffff }} text {{ fill: #1f2328 }} .quiet {{ fill: #59636e }}
  .ours {{ fill: #1f6feb }} .other {{ fill: #8c959f }} .line {{ stroke: #1f2328 }} .axis {{ stroke: #d1d9e0 }}
  @media (prefers-color-scheme: dark) {{
    .page {{ fill: #0d1117 }} text {{ fill: #f0f6fc }} .quiet {{ fill: #9198a1 }}
    .ours {{ fill: #4493f8 }} .other {{ fill: #6e7681 }} .line {{ stroke: #f0f6fc }} .axis {{ stroke: #3d444d }}
  }}
</style>
<rect class="page" width="{WIDTH}" height="{height}"/>
{body}</svg>
"##
    )
}

/// Draws a scenario from `y` down, and returns where the next one begins.
fn scenario(body: &mut String, result: &ScenarioResult, y: f64) -> f64 {
    let contenders = by_speed(result);
    let largest = |of: fn(&Measured) -> Option<f64>| {
        contenders
            .iter()
            .filter_map(|it| of(it))
            .fold(0.0, f64::max)
    };
    let speed_scale = largest(|it| it.useful_tokens_per_s.map(|spread| spread.max));
    let memory_scale = largest(|it| it.memory().map(|bytes| bytes as f64));
    text(
        body,
        (20.0, y),
        "",
        &format!("{}: {}", result.name, result.title),
        true,
    );
    text(
        body,
        (SPEED.0, y + 22.0),
        "quiet",
        "useful tokens/s (median, min–max)",
        false,
    );
    text(body, (MEMORY.0, y + 22.0), "quiet", "peak memory", false);
    let top = y + 32.0;
    let bottom = top + ROW * contenders.len() as f64;
    for x in [SPEED.0, MEMORY.0] {
        line(body, "axis", (x, top), (x, bottom));
    }
    for (index, measured) in contenders.iter().enumerate() {
        let middle = top + ROW * (index as f64 + 0.5);
        let class = if measured.id.starts_with("ours") {
            "ours"
        } else {
            "other"
        };
        text(body, (20.0, middle + 4.5), "", measured.name, false);
        if let Some(spread) = measured.useful_tokens_per_s {
            let shown = Bar {
                value: spread.median,
                whisker: Some((spread.min, spread.max)),
                label: human::rate(spread.median),
            };
            bar(body, class, SPEED, speed_scale, middle, &shown);
        }
        if let Some(bytes) = measured.memory() {
            let shown = Bar {
                value: bytes as f64,
                whisker: None,
                label: human::bytes(bytes),
            };
            bar(body, class, MEMORY, memory_scale, middle, &shown);
        }
    }
    bottom + 44.0
}

fn bar(
    body: &mut String,
    class: &str,
    (left, right): (f64, f64),
    scale: f64,
    middle: f64,
    bar: &Bar,
) {
    let x = |value: f64| {
        if scale > 0.0 {
            left + (right - left) * value / scale
        } else {
            left
        }
    };
    let (top, width) = (middle - BAR / 2.0, x(bar.value) - left);
    // Writing to a string does not fail.
    let _ = writeln!(
        body,
        r#"<rect class="{class}" x="{left:.1}" y="{top:.1}" width="{width:.1}" height="{BAR}" rx="2"/>"#
    );
    let mut end = x(bar.value);
    if let Some((min, max)) = bar.whisker {
        end = x(max);
        line(body, "line", (x(min), middle), (end, middle));
        for x in [x(min), end] {
            line(body, "line", (x, middle - 4.0), (x, middle + 4.0));
        }
    }
    text(body, (end + 8.0, middle + 4.5), "", &bar.label, false);
}

fn line(body: &mut String, class: &str, from: (f64, f64), to: (f64, f64)) {
    let ((x1, y1), (x2, y2)) = (from, to);
    let _ = writeln!(
        body,
        r#"<line class="{class}" x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}"/>"#
    );
}

fn text(body: &mut String, (x, y): (f64, f64), class: &str, words: &str, bold: bool) {
    let weight = if bold { r#" font-weight="600""# } else { "" };
    let words = escaped(words);
    let _ = writeln!(
        body,
        r#"<text class="{class}" x="{x:.1}" y="{y:.1}"{weight}>{words}</text>"#
    );
}

fn escaped(words: &str) -> String {
    words
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::super::tests::results;
    use super::*;

    /// Whether every tag is closed in order and no text contains unescaped characters.
    fn well_formed(svg: &str) -> Result<(), String> {
        let mut open: Vec<&str> = Vec::new();
        let mut rest = svg;
        while let Some(start) = rest.find('<') {
            let end = rest[start..].find('>').ok_or("a tag without an end")? + start;
            let tag = &rest[start + 1..end];
            if tag.matches('"').count() % 2 == 1 {
                return Err(format!("quotes in <{tag}>"));
            }
            let name = tag
                .trim_start_matches('/')
                .split([' ', '/'])
                .next()
                .unwrap_or("");
            match (tag.starts_with('/'), tag.ends_with('/')) {
                (true, _) if open.pop() != Some(name) => return Err(format!("</{name}>")),
                (true, _) | (_, true) => {}
                _ => open.push(name),
            }
            rest = &rest[end + 1..];
            let text = &rest[..rest.find('<').unwrap_or(rest.len())];
            for (at, _) in text.match_indices('&') {
                let entity = ["&amp;", "&lt;", "&gt;", "&quot;"];
                if !entity.iter().any(|entity| text[at..].starts_with(entity)) {
                    return Err(format!("& in {text:?}"));
                }
            }
        }
        if open.is_empty() {
            Ok(())
        } else {
            Err(format!("not closed: {open:?}"))
        }
    }

    #[test]
    fn the_plot_is_well_formed_and_has_every_contender() {
        let mut results = results();
        results.scenarios[0].title = "a < b & \"c\"".into();
        let svg = plot(&results).unwrap();
        well_formed(&svg).unwrap();
        for measured in &results.scenarios[0].contenders {
            assert!(svg.contains(&format!(">{}</text>", measured.name)), "{svg}");
        }
        assert!(svg.contains("prefers-color-scheme: dark"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
        assert!(well_formed("<svg><text>a & b</text></svg>").is_err());
        assert!(well_formed("<svg><text></svg>").is_err());
    }

    #[test]
    fn a_lone_contender_gives_no_plot() {
        let mut results = results();
        results.scenarios[0].contenders.truncate(1);
        assert_eq!(plot(&results), None);
    }
}
