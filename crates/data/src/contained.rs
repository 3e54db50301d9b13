//! Catches panics of third-party parsers and turns them into messages.
//!
//! Our own code does not panic on a damaged file. A crate that does must not end a run, and must not write its report
//! over the screen.

/// Runs `work`. A panic on this thread is returned as an error; see [`panics::catch`].
///
/// Values that `work` changes may be half changed after a panic, so they must then be dropped.
///
/// # Errors
///
/// The message of the panic, in one line of at most 300 characters.
pub fn contain<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    let outcome = panics::catch(work);
    outcome.map_err(|message| llama_burn::limited::clipped(&message, 300).into_owned())
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
