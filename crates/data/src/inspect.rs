//! Rows as the model sees them: every token, and which of them are in the loss.

use std::io::{self, Write};

use console::Style;
use tokenizers::Tokenizer;

use super::Data;
use super::tokenize::TokenizedRow;
use crate::contained::decoded;

/// Ids in one line of the screen.
const IDS_PER_LINE: usize = 16;

/// Writes the formats and statistics of a run's data, and the first `rows` training rows as [`inspect_rows`] does.
///
/// # Errors
///
/// Errors of `out`.
pub fn inspect(data: &Data, rows: usize, out: &mut impl Write, colour: bool) -> io::Result<()> {
    writeln!(out, "format      {}", data.formats())?;
    writeln!(out, "training    {}", data.train.statistics())?;
    if data.validation.is_empty() && data.validation.too_long == 0 {
        writeln!(out, "validation  none")?
    } else {
        writeln!(out, "validation  {}", data.validation.statistics())?
    }
    for warning in &data.warnings {
        writeln!(out, "note        {warning}")?;
    }
    writeln!(out)?;
    let rows = &data.train.rows[..rows.min(data.train.len())];
    writeln!(out, "{}", data.train.path.display())?;
    inspect_rows(rows, data.tokenizer.tokenizer(), out, colour)
}

/// Writes the first `rows` training rows as JSON lines of `{"line", "ids", "learned"}`: the tokens, and the
/// ranges of positions (from, to, the latter excluded) that are in the loss. For programs.
///
/// # Errors
///
/// Errors of `out`.
pub fn inspect_as_json(data: &Data, rows: usize, out: &mut impl Write) -> io::Result<()> {
    for row in data.train.rows.iter().take(rows) {
        let learned = row.learned.iter();
        let learned: Vec<[usize; 2]> = learned.map(|range| [range.start, range.end]).collect();
        let line = serde_json::json!({"line": row.line, "ids": row.ids, "learned": learned});
        writeln!(out, "{line}")?;
    }
    Ok(())
}

/// Writes rows with every token visible, the supervised ones green, or in brackets without `colour`; then the
/// ids, and which position predicts which supervised token.
///
/// # Errors
///
/// Errors of `out`.
pub fn inspect_rows(
    rows: &[TokenizedRow],
    tokenizer: &Tokenizer,
    out: &mut impl Write,
    colour: bool,
) -> io::Result<()> {
    let styles = Styles::new(colour);
    legend(out, &styles)?;
    for row in rows {
        let supervised = row.supervised_tokens();
        let is_learned = learned(row);
        let heading = format!("line {}", row.line);
        writeln!(out)?;
        writeln!(
            out,
            "{}: {} tokens, {} not in the loss, {supervised} in the loss",
            styles.heading.apply_to(heading),
            row.ids.len(),
            row.ids.len() - supervised,
        )?;
        let separator = styles.dim.apply_to("|");
        for (position, id) in row.ids.iter().enumerate() {
            let text = visible(tokenizer, *id);
            let line_ends = text.ends_with('↵');
            match (is_learned[position], colour) {
                (false, _) => write!(out, "{text}{separator}")?,
                (true, true) => write!(out, "{}{separator}", styles.supervised.apply_to(text))?,
                (true, false) => write!(out, "[{text}]")?,
            }
            if line_ends {
                writeln!(out)?;
            }
        }
        writeln!(out)?;
        write_ids(row, out, &styles, colour)?;
        for (position, id) in row.supervised() {
            let predicts = position - 1;
            writeln!(
                out,
                "  position {predicts} ({}, {}) predicts {} ({id})",
                visible(tokenizer, row.ids[predicts]),
                row.ids[predicts],
                styles.supervised.apply_to(visible(tokenizer, id)),
            )?;
        }
    }
    Ok(())
}

struct Styles {
    heading: Style,
    supervised: Style,
    dim: Style,
}

impl Styles {
    /// The caller knows whether `out` is a terminal; console would check the standard output.
    fn new(colour: bool) -> Self {
        let style = Style::new().force_styling(colour);
        Self {
            heading: style.clone().bold(),
            supervised: style.clone().green().bold(),
            dim: style.dim(),
        }
    }
}

fn legend(out: &mut impl Write, styles: &Styles) -> io::Result<()> {
    let supervised = match styles.supervised.apply_to("x").to_string().len() {
        1 => "[target]".into(),
        _ => styles.supervised.apply_to("target").to_string(),
    };
    writeln!(
        out,
        "| separates tokens. prompt| is not in the loss, {supervised} is in the loss."
    )?;
    writeln!(
        out,
        "· space, ↵ line break, ⇥ tab, <0xE2> part of a character. Positions count from 0."
    )
}

fn write_ids(
    row: &TokenizedRow,
    out: &mut impl Write,
    styles: &Styles,
    colour: bool,
) -> io::Result<()> {
    let is_learned = learned(row);
    for (line, ids) in row.ids.chunks(IDS_PER_LINE).enumerate() {
        let start = line * IDS_PER_LINE;
        write!(out, "  {}", styles.dim.apply_to(format!("{start:>5}:")))?;
        for (offset, id) in ids.iter().enumerate() {
            match (is_learned[start + offset], colour) {
                (false, _) => write!(out, " {id}")?,
                (true, true) => write!(out, " {}", styles.supervised.apply_to(id))?,
                (true, false) => write!(out, " [{id}]")?,
            }
        }
        writeln!(out)?;
    }
    Ok(())
}

/// Which tokens are in the loss.
fn learned(row: &TokenizedRow) -> Vec<bool> {
    let mut learned = vec![false; row.ids.len()];
    for (position, _) in row.supervised() {
        learned[position] = true;
    }
    learned
}

/// A token's text with its white space made visible.
fn visible(tokenizer: &Tokenizer, id: u32) -> String {
    let Some(piece) = tokenizer.id_to_token(id) else {
        return format!("<unknown id {id}>");
    };
    // A SentencePiece decoder drops the space of a first piece, and a lone piece is always the first.
    let decoded = if piece.contains('▁') {
        piece.replace('▁', " ")
    } else {
        decoded(tokenizer, &[id], false)
    };
    let text = if decoded.is_empty() || decoded.contains('\u{fffd}') {
        bytes_of(&piece).unwrap_or(piece)
    } else {
        decoded
    };
    let mut shown = String::new();
    for character in text.chars() {
        match character {
            ' ' => shown.push('·'),
            '\n' => shown.push('↵'),
            '\t' => shown.push('⇥'),
            // Escape sequences in the data must not reach the terminal.
            c if c.is_control() => shown.extend(c.escape_default()),
            c => shown.push(c),
        }
    }
    shown
}

/// The bytes of a byte-level piece that is only a part of a character, as `<0xE2>`; `None` for other pieces.
///
/// Byte-level BPE (GPT-2's) writes printable Latin-1 bytes as themselves, and the others as the characters from
/// U+0100 on, in order.
fn bytes_of(piece: &str) -> Option<String> {
    let itself = |byte: u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let others: Vec<u8> = (0..=u8::MAX).filter(|byte| !itself(*byte)).collect();
    let mut text = String::new();
    for character in piece.chars() {
        let byte = match u32::from(character) {
            code @ 0..=0xff => Some(code as u8).filter(|byte| itself(*byte)),
            code => others.get(code as usize - 0x100).copied(),
        }?;
        if byte.is_ascii() {
            text.push(char::from(byte))
        } else {
            text += &format!("<0x{byte:02X}>")
        }
    }
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::super::tokenize::RowTokenizer;
    use super::super::tokenize::tests::word_files;
    use super::*;
    use crate::PromptTemplate;

    fn shown(colour: bool) -> String {
        let tokenizer = RowTokenizer::new(
            &word_files(&["good", "news", "positive"], true),
            &PromptTemplate::Raw,
        )
        .unwrap();
        let row = TokenizedRow::answer(17, vec![1, 3, 4, 5, 2], 3);
        let mut out = Vec::new();
        inspect_rows(&[row], tokenizer.tokenizer(), &mut out, colour).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn without_colour_the_supervised_tokens_are_in_brackets() {
        let text = shown(false);
        assert!(
            text.contains("line 17: 5 tokens, 3 not in the loss, 2 in the loss"),
            "{text}"
        );
        assert!(text.contains("<s>|good|news|[positive][</s>]\n"), "{text}");
        assert!(text.contains(" 1 3 4 [5] [2]\n"), "{text}");
        assert!(
            text.contains("position 2 (news, 4) predicts positive (5)\n"),
            "{text}"
        );
        assert!(
            text.contains("position 3 (positive, 5) predicts </s> (2)\n"),
            "{text}"
        );
        assert!(!text.contains('\u{1b}'), "{text}");
    }

    #[test]
    fn a_program_gets_ids_and_learned_ranges() {
        let row = TokenizedRow {
            line: 3,
            ids: vec![1, 5, 2, 4],
            learned: vec![1..2, 3..4],
        };
        let data = Data::of_rows(vec![row.clone(), row]);
        let mut out = Vec::new();
        inspect_as_json(&data, 1, &mut out).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "{\"line\":3,\"ids\":[1,5,2,4],\"learned\":[[1,2],[3,4]]}\n"
        );
    }

    #[test]
    fn with_colour_the_supervised_tokens_and_nothing_of_the_prompt_are_green() {
        let text = shown(true);
        assert!(
            text.contains("\u{1b}[32m\u{1b}[1mpositive\u{1b}[0m"),
            "{text:?}"
        );
        assert!(
            text.contains("|good") || text.contains("good\u{1b}[2m|"),
            "{text:?}"
        );
        assert!(!text.contains("[positive]"), "{text:?}");
    }

    #[test]
    fn white_space_and_control_characters_are_visible() {
        let tokenizer = word_files(&["a\u{1b}b", "▁new", "x\n"], false);
        let tokenizer = RowTokenizer::new(&tokenizer, &PromptTemplate::Raw).unwrap();
        let visible = |id| visible(tokenizer.tokenizer(), id);
        assert_eq!(visible(3), "a\\u{1b}b");
        assert_eq!(visible(4), "·new");
        assert_eq!(visible(5), "x↵");
        assert_eq!(visible(77), "<unknown id 77>");
    }

    #[test]
    fn parts_of_characters_are_shown_as_bytes() {
        assert_eq!(bytes_of("Ġâ").as_deref(), Some(" <0xE2>"));
        assert_eq!(bytes_of("Ĥ").as_deref(), Some("<0x82>"));
        assert_eq!(bytes_of("日"), None);
    }
}
