//! Tables for the screen and for Markdown.

use crate::human;

/// A table: a heading, columns, notes below.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Table {
    /// The heading.
    pub title: String,
    /// The header. The first column is text. The others are numbers, aligned to the right, except those in
    /// `words`.
    pub header: Vec<String>,
    /// The cells, row by row. Each row has as many cells as the header.
    pub rows: Vec<Vec<String>>,
    /// Indices of further columns of text.
    pub words: Vec<usize>,
    /// Sentences below the table.
    pub notes: Vec<String>,
}

/// Width of a line.
const WIDTH: usize = 100;

impl Table {
    /// A table without rows.
    pub fn new(title: impl Into<String>, header: &[&str]) -> Self {
        Self {
            title: title.into(),
            header: header.iter().map(|cell| cell.to_string()).collect(),
            ..Self::default()
        }
    }

    /// Lines for the screen.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = wrapped(&self.title, "");
        let mut rows = vec![self.header.clone()];
        rows.extend(self.rows.iter().cloned());
        let columns = human::columns(&rows, &self.numbers());
        lines.extend(
            columns
                .iter()
                .map(|line| format!("  {line}").trim_end().to_string()),
        );
        lines.extend(self.notes.iter().flat_map(|note| wrapped(note, "  ")));
        lines
    }

    /// Text for a Markdown file.
    pub fn markdown(&self) -> String {
        let line = |cells: &[String]| {
            let cells: Vec<String> = cells.iter().map(|cell| cell.replace('|', "\\|")).collect();
            format!("| {} |\n", cells.join(" | "))
        };
        let numbers = self.numbers();
        let rule = (0..self.header.len()).map(|column| {
            if numbers.contains(&column) {
                "---:".to_string()
            } else {
                "---".to_string()
            }
        });
        let mut text = format!("### {}\n\n", self.title);
        text += &line(&self.header);
        text += &line(&rule.collect::<Vec<_>>());
        for row in &self.rows {
            text += &line(row);
        }
        for note in &self.notes {
            text += &format!("\n{note}\n");
        }
        text
    }

    fn numbers(&self) -> Vec<usize> {
        let columns = 1..self.header.len();
        columns
            .filter(|column| !self.words.contains(column))
            .collect()
    }
}

/// Breaks a text into lines of at most 100 columns that start with `indent`.
pub fn wrapped(text: &str, indent: &str) -> Vec<String> {
    let mut lines = vec![indent.to_string()];
    for word in text.split_whitespace() {
        let last = lines
            .last()
            .map_or(0, |line| console::measure_text_width(line));
        let full = last + 1 + console::measure_text_width(word) > WIDTH && last > indent.len();
        if full {
            lines.push(indent.to_string());
        }
        if let Some(line) = lines.last_mut() {
            if line.len() > indent.len() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new("Speed", &["", "tokens/s", "why"]);
        table.words = vec![2];
        table.rows = vec![
            vec!["ours".into(), "1,000".into(), "a|b".into()],
            vec!["theirs".into(), "5".into(), String::new()],
        ];
        table.notes = vec!["word ".repeat(40).trim().into()];
        table
    }

    #[test]
    fn numbers_are_flushed_right_and_notes_wrapped() {
        let lines = table().lines();
        assert_eq!(
            lines[..4],
            [
                "Speed",
                "          tokens/s  why",
                "  ours       1,000  a|b",
                "  theirs         5"
            ]
        );
        assert!(lines[4..].len() == 3 && lines.iter().all(|line| line.len() <= WIDTH));
    }

    #[test]
    fn markdown_escapes_what_would_end_a_cell() {
        let text = table().markdown();
        assert!(
            text.contains("| --- | ---: | --- |\n| ours | 1,000 | a\\|b |\n"),
            "{text}"
        );
    }
}
