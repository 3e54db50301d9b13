//! Colors, for terminals that support them.

/// Colors text, or leaves it unchanged.
#[derive(Debug, Clone, Copy)]
pub struct Style {
    color: bool,
}

impl Style {
    /// No colors: for files, for pipes, and if `NO_COLOR` is set.
    pub fn plain() -> Self {
        Self { color: false }
    }

    /// Colors if the terminal supports them. `console` reads `NO_COLOR`, `CLICOLOR` and `TERM`.
    pub fn of_terminal() -> Self {
        Self {
            color: console::colors_enabled(),
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
        if self.color {
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
        assert!(Style { color: true }.bold("x").contains("\u{1b}["));
    }
}
