//! Other people's parsers, whose panics on a damaged file become messages.
//!
//! What is ours does not panic on a file; a crate that does must not take a run down, nor write its own report over
//! the screen.

use std::any::Any;
use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

thread_local! {
    /// How many calls of [`contain`] this thread is in.
    static INSIDE: Cell<usize> = const { Cell::new(0) };
}

/// Runs `work`; a panic on this thread becomes its message. Panics of other threads are reported as ever.
///
/// Values that `work` was changing may be half changed after a panic; use it where they are then dropped, or where
/// it only reads.
///
/// # Errors
///
/// The panic's words, in one line.
pub fn contain<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let reporting = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !is_inside() {
                reporting(info);
            }
        }));
    });
    INSIDE.with(|inside| inside.set(inside.get() + 1));
    let outcome = panic::catch_unwind(AssertUnwindSafe(work));
    INSIDE.with(|inside| inside.set(inside.get() - 1));
    outcome.map_err(|payload| words(payload.as_ref()))
}

/// Whether this thread is inside of [`contain`], so that its panic is caught on purpose.
pub fn is_inside() -> bool {
    INSIDE.with(Cell::get) > 0
}

/// The text of tokens; none where the decoder of `tokenizer.json` does not work.
pub fn decoded(
    tokenizer: &tokenizers::Tokenizer,
    ids: &[u32],
    skip_special_tokens: bool,
) -> String {
    let decoded = contain(|| tokenizer.decode(ids, skip_special_tokens));
    decoded.ok().and_then(Result::ok).unwrap_or_default()
}

fn words(payload: &dyn Any) -> String {
    let text = payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("it gave up without saying why");
    let words: Vec<&str> = text.split_whitespace().collect();
    llama_burn::limited::clipped(&words.join(" "), 300).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_its_words_and_the_next_call_works() {
        let text = String::from("not\n  valid");
        assert_eq!(
            contain(|| panic!("{text}")),
            Err::<(), _>("not valid".into())
        );
        let nested = contain(|| contain(|| panic!("inner")).unwrap_err() + ", outer");
        assert_eq!(nested.unwrap(), "inner, outer");
        assert_eq!(contain(|| 7), Ok(7));
        let long = "x".repeat(1000);
        assert!(contain(|| -> () { panic!("{long}") }).unwrap_err().len() < 400);
    }
}
