//! The loss over the run, drawn with characters.

use terminal::human;

/// Rows of the drawing.
const HEIGHT: usize = 7;

/// A braille character has two columns and four rows of dots.
const DOTS: (usize, usize) = (2, 4);

/// Draws `losses`, one per step, as a line of dots `width` columns wide, axis included, and
/// `validations`, `(step, loss)`, as circles. Returns no lines for fewer than two finite losses.
///
/// With more steps than dots, a dot is the mean of its steps.
pub fn draw(losses: &[f64], validations: &[(usize, f64)], width: usize) -> Vec<String> {
    let finite = |loss: &f64| loss.is_finite();
    if losses.iter().copied().filter(finite).count() < 2 {
        return Vec::new();
    }
    let label_width = 8;
    let columns = width.saturating_sub(label_width + 3).clamp(8, 96);
    let means = resample(losses, columns * DOTS.0);
    let shown = validations.iter().map(|(_, loss)| *loss).filter(finite);
    let all = means.iter().copied().filter(finite).chain(shown);
    let (low, high) = all.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), loss| {
        (low.min(loss), high.max(loss))
    });
    let range = match high - low {
        range if range > 0.0 => range,
        _ => 1.0,
    };
    // 0 is the top.
    let row = |loss: f64, rows: usize| ((high - loss) / range * (rows - 1) as f64).round() as usize;

    let mut cells = vec![vec![0u8; columns]; HEIGHT];
    let mut above: Option<usize> = None;
    for (x, mean) in means.iter().enumerate() {
        if !mean.is_finite() {
            above = None;
            continue;
        }
        let y = row(*mean, HEIGHT * DOTS.1);
        // Down to or up from the dot before, so that the line does not break on steep parts.
        let (from, to) = match above {
            Some(before) if before + 1 < y => (before + 1, y),
            Some(before) if y + 1 < before => (y, before - 1),
            _ => (y, y),
        };
        for y in from..=to {
            cells[y / DOTS.1][x / DOTS.0] |= dot(x % DOTS.0, y % DOTS.1);
        }
        above = Some(y);
    }
    let mut picture: Vec<Vec<char>> = cells
        .iter()
        .map(|row| row.iter().map(|bits| braille(*bits)).collect())
        .collect();
    for (step, loss) in validations.iter().filter(|(_, loss)| loss.is_finite()) {
        let x = step * (columns - 1) / losses.len().max(1);
        picture[row(*loss, HEIGHT)][x.min(columns - 1)] = '●';
    }

    let mut lines = Vec::with_capacity(HEIGHT + 2);
    for (y, row) in picture.iter().enumerate() {
        let label = match y {
            0 => human::number(high),
            y if y == HEIGHT - 1 => human::number(low),
            y if y == HEIGHT / 2 => human::number(high - range / 2.0),
            _ => String::new(),
        };
        let row: String = row.iter().collect();
        let axis = if label.is_empty() { '│' } else { '┤' };
        lines.push(
            format!("{label:>label_width$} {axis}{row}")
                .trim_end()
                .to_string(),
        );
    }
    lines.push(format!("{:label_width$} └{}", "", "─".repeat(columns)));
    let (first, last) = ("1", human::count(losses.len() as u64));
    let space = columns.saturating_sub(first.len() + last.len());
    lines.push(format!(
        "{:label_width$}  {first}{}{last}",
        "",
        " ".repeat(space)
    ));
    lines
}

/// `dots` values: means of as many steps as fall on each, or interpolated where there are fewer steps.
fn resample(losses: &[f64], dots: usize) -> Vec<f64> {
    if losses.len() >= dots {
        let start = |dot: usize| dot * losses.len() / dots;
        return (0..dots)
            .map(|dot| {
                let part = losses[start(dot)..start(dot + 1)].iter();
                let part: Vec<f64> = part.copied().filter(|loss| loss.is_finite()).collect();
                part.iter().sum::<f64>() / part.len() as f64
            })
            .collect();
    }
    let last = losses.len() - 1;
    (0..dots)
        .map(|dot| {
            let position = dot as f64 * last as f64 / (dots - 1) as f64;
            let left = (position.floor() as usize).min(last);
            let right = (left + 1).min(last);
            let share = position - left as f64;
            if share > 0.0 {
                losses[left] * (1.0 - share) + losses[right] * share
            } else {
                losses[left]
            }
        })
        .collect()
}

/// The bit of a dot in a braille character (Unicode's order: three down, three down, then the fourth row).
fn dot(x: usize, y: usize) -> u8 {
    match (x, y) {
        (0, 3) => 1 << 6,
        (_, 3) => 1 << 7,
        (x, y) => 1 << (x * 3 + y),
    }
}

fn braille(bits: u8) -> char {
    match bits {
        0 => ' ',
        _ => char::from_u32(0x2800 + u32::from(bits)).unwrap_or(' '),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_falling_loss_starts_at_the_top_left_and_ends_at_the_bottom_right() {
        let losses: Vec<f64> = (0..500).map(|step| 3.0 - step as f64 / 200.0).collect();
        let lines = draw(&losses, &[(500, 0.505)], 60);
        assert_eq!(lines.len(), HEIGHT + 2);
        assert!(
            lines
                .iter()
                .all(|line| console::measure_text_width(line) <= 60)
        );
        assert!(lines[0].starts_with("  2.9"), "{}", lines[0]);
        let first = lines[0].chars().position(|c| c as u32 >= 0x2800).unwrap();
        assert_eq!(first, 10, "the line begins right at the axis");
        assert!(lines[HEIGHT - 1].ends_with('●'));
        assert!(lines[HEIGHT + 1].ends_with("500"));
    }

    #[test]
    fn few_steps_are_joined_and_what_is_not_finite_is_a_gap() {
        let lines = draw(&[2.0, 1.0, f64::NAN, 1.5, 0.5], &[(1, f64::NAN)], 80);
        assert_eq!(lines.len(), HEIGHT + 2);
        assert!(!lines.concat().contains('●'));
        assert!(draw(&[1.0], &[], 80).is_empty());
        assert!(draw(&[f64::NAN; 4], &[], 80).is_empty());
        assert_eq!(draw(&[1.0, 1.0], &[], 0).len(), HEIGHT + 2, "any width");
    }

    #[test]
    fn many_steps_become_means() {
        let losses = [1.0, 3.0, 5.0, 7.0];
        assert_eq!(resample(&losses, 2), [2.0, 6.0]);
        assert_eq!(resample(&losses, 4), losses);
        assert_eq!(resample(&[1.0, 3.0], 3), [1.0, 2.0, 3.0]);
    }
}
