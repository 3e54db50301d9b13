//! Output for people: lines, progress bars, tables, readable numbers.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`human`] | numbers, sizes and durations as text |
//! | screen | lines on standard output, with a progress bar below them |
//! | [`statistics`] | medians, spreads and ratios of measurements |
//! | style | colors |
//! | table | tables for the screen and for Markdown |

pub mod human;
mod screen;
pub mod statistics;
mod style;
mod table;

pub use screen::{KEPT_SPACE, Printer, Screen, ScreenKind, Task, bar_style, wrap};
pub use style::Style;
pub use table::{Table, wrapped};
