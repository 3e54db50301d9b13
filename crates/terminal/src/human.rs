//! Numbers, sizes and durations as text.

use std::time::Duration;

use console::measure_text_width;

/// A count with thousands separators: `134,515,008`.
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A count with its noun: `1 row`, `3,100 rows`. The plural is the noun with an s.
pub fn counted(number: u64, noun: &str) -> String {
    match number {
        1 => format!("1 {noun}"),
        _ => format!("{} {noun}s", count(number)),
    }
}

/// Bytes in the largest binary unit that leaves at least 1, with three significant digits: `812 MiB`.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    // 999.5 would be printed as 1000.
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let decimals = match value {
        value if value < 9.995 => 2,
        value if value < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.decimals$} {}", UNITS[unit])
}

/// Bytes in MiB, the unit of `metrics.jsonl`.
pub fn mib(bytes: u64) -> f64 {
    bytes as f64 / (1024.0 * 1024.0)
}

/// A duration in its two largest units: `4m 02s`, `1h 05m`, `12.3s`.
pub fn duration(duration: Duration) -> String {
    let tenths = (duration.as_secs_f64() * 10.0).round() / 10.0;
    if tenths < 60.0 {
        return format!("{tenths:.1}s");
    }
    let seconds = duration.as_secs_f64().round() as u64;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match (days, hours) {
        (0, 0) => format!("{minutes}m {:02}s", seconds % 60),
        (0, _) => format!("{hours}h {:02}m", minutes % 60),
        _ => format!("{days}d {:02}h", hours % 24),
    }
}

/// As [`duration`], rounded to whole seconds.
pub fn clock(time: Duration) -> String {
    match time.as_secs_f64().round() {
        seconds if seconds < 60.0 => format!("{seconds}s"),
        seconds => duration(Duration::from_secs_f64(seconds)),
    }
}

/// A loss, a norm or a rate with about four significant digits. Very small and very large values are in
/// scientific notation.
pub fn number(value: f64) -> String {
    let size = value.abs();
    match size {
        _ if !value.is_finite() => value.to_string(),
        0.0 => "0".into(),
        _ if size < 1e-3 => {
            let text = format!("{value:.2e}");
            // 2.00e-4 becomes 2e-4.
            match text.split_once('e') {
                Some((digits, exponent)) => {
                    let digits = digits.trim_end_matches('0').trim_end_matches('.');
                    format!("{digits}e{exponent}")
                }
                None => text,
            }
        }
        _ if size < 10.0 => format!("{value:.4}"),
        _ if size < 1000.0 => format!("{value:.2}"),
        _ if size < 1e15 => {
            let sign = if value < 0.0 { "-" } else { "" };
            format!("{sign}{}", count(size.round() as u64))
        }
        _ => format!("{value:.2e}"),
    }
}

/// A number per second: `1,204`, `12.3`.
pub fn rate(value: f64) -> String {
    match value {
        value if value >= 99.95 => count(value.round() as u64),
        value => format!("{value:.1}"),
    }
}

/// A fraction in percent: 0.843 is `84.3 %`.
pub fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

/// Aligns the cells of `rows` in columns, two spaces apart. The columns whose indices are in `right` are
/// aligned to the right. Color codes have no width. Lines have no trailing spaces.
pub fn columns(rows: &[Vec<String>], right: &[usize]) -> Vec<String> {
    let widest = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells
            .map(|cell| measure_text_width(cell))
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..widest).map(width).collect();
    let line = |row: &Vec<String>| {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let space = " ".repeat(widths[column] - measure_text_width(cell));
            let gap = if column > 0 { "  " } else { "" };
            if right.contains(&column) {
                line.extend([gap, &space, cell])
            } else {
                line.extend([gap, cell, &space])
            }
        }
        line.trim_end().to_string()
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_grouped_by_thousands() {
        let cases = [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (70_553_706_496, "70,553,706,496"),
        ];
        for (number, text) in cases {
            assert_eq!(count(number), text);
        }
        assert_eq!(
            (counted(1, "row"), counted(2000, "row")),
            ("1 row".into(), "2,000 rows".into())
        );
    }

    #[test]
    fn bytes_have_three_significant_digits() {
        let cases = [
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (1536 << 10, "1.50 MiB"),
            (812 << 20, "812 MiB"),
            (1000 << 20, "0.98 GiB"),
            (75 << 30, "75.0 GiB"),
            (u64::MAX, "16384 PiB"),
        ];
        for (number, text) in cases {
            assert_eq!(bytes(number), text);
        }
    }

    #[test]
    fn durations_have_two_units() {
        let cases = [
            (0.04, "0.0s"),
            (12.34, "12.3s"),
            (59.96, "1m 00s"),
            (242.0, "4m 02s"),
            (3599.6, "1h 00m"),
            (90_000.0, "1d 01h"),
        ];
        for (seconds, text) in cases {
            assert_eq!(duration(Duration::from_secs_f64(seconds)), text);
        }
        let clocks = [0.4, 59.6, 242.0].map(|seconds| clock(Duration::from_secs_f64(seconds)));
        assert_eq!(clocks, ["0s", "1m 00s", "4m 02s"]);
    }

    #[test]
    fn numbers_keep_four_digits_whatever_their_size() {
        let cases = [
            (0.0, "0"),
            (2e-4, "2e-4"),
            (-1.85e-7, "-1.85e-7"),
            (0.41234, "0.4123"),
            (12.345, "12.35"),
            (1204.4, "1,204"),
            (-54_321.0, "-54,321"),
            (3e20, "3.00e20"),
            (f64::NAN, "NaN"),
            (f64::INFINITY, "inf"),
        ];
        for (value, text) in cases {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn rates_are_whole_where_they_are_large() {
        assert_eq!(
            [1204.4, 99.96, 12.34, 0.0].map(rate),
            ["1,204", "100", "12.3", "0.0"]
        );
    }

    #[test]
    fn columns_line_up_and_leave_no_trailing_space() {
        let row = |cells: [&str; 3]| cells.map(String::from).to_vec();
        let rows = [row(["α", "5", ""]), row(["beta", "1,234", "x"])];
        assert_eq!(columns(&rows, &[1]), ["α         5", "beta  1,234  x"]);
        assert_eq!(columns(&[], &[0]), Vec::<String>::new());
    }
}
