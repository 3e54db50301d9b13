//! Catches panics of third-party parsers and turns them into messages.
//!
//! Our own code does not panic on a damaged file. A crate that does must not end a run, and must not write its report
//! over the screen.

use std::any::Any;
use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

thread_local! {
    /// Depth of the nested calls of [`contain`] on this thread.
    static INSIDE: Cell<usize> = const { Cell::new(0) };
}

/// Runs `work`. A panic on this thread is returned as an error; panics of other threads are reported as usual.
///
/// Values that `work` changes may be half changed after a panic, so they must then be dropped.
///
/// # Errors
///
/// The message of the panic, in one line.
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

/// Whether this thread is inside [`contain`], which catches its panics.
pub fn is_inside() -> bool {
    INSIDE.with(Cell::get) > 0
}

/// The text of tokens; empty if the decoder of `tokenizer.json` fails.
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
