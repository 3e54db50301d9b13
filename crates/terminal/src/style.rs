//! Colours, where they are wanted.

/// Paints words, or leaves them as they are.
#[derive(Debug, Clone, Copy)]
pub struct Style {
    colour: bool,
}

impl Style {
    /// No colours: files, pipes, `NO_COLOR`.
    pub fn plain() -> Self {
        Self { colour: false }
    }

    /// What the terminal wants; `console` asks `NO_COLOR`, `CLICOLOR` and `TERM`.
    pub fn of_terminal() -> Self {
        Self {
            colour: console::colors_enabled(),
        }
    }

    /// Less visible than the rest.
    pub fn dim(self, text: &str) -> String {
        self.paint(text, console::Style::dim)
    }

    /// Bold.
    pub fn bold(self, text: &str) -> String {
        self.paint(text, console::Style::bold)
    }

    /// Green.
    pub fn good(self, text: &str) -> String {
        self.paint(text, console::Style::green)
    }

    /// Yellow.
    pub fn warn(self, text: &str) -> String {
        self.paint(text, console::Style::yellow)
    }

    fn paint(self, text: &str, with: fn(console::Style) -> console::Style) -> String {
        if self.colour {
            with(console::Style::new())
                .force_styling(true)
                .apply_to(text)
                .to_string()
        } else {
            text.to_string()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_words_have_no_escapes() {
        assert_eq!(Style::plain().bold("x"), "x");
        assert!(Style { colour: true }.bold("x").contains("\u{1b}["));
    }
}
