//! What people see: lines, progress bars, tables, numbers.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`human`] | numbers, sizes and times as people write them |
//! | screen | lines on standard output, a progress bar below them |
//! | [`statistics`] | medians, spreads and ratios of measurements |
//! | table | tables for the screen and for Markdown |

pub mod human;
mod screen;
pub mod statistics;
mod style;
mod table;

pub use screen::{KEPT_SPACE, Printer, Screen, ScreenKind, Task, bar_style, wrap};
pub use style::Style;
pub use table::{Table, wrapped};
