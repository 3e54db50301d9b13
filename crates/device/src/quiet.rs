//! Panics of drivers and of Burn's backends, turned into messages.

/// Runs `work`; a panic inside it, on any thread, becomes a message instead of a report on the
/// screen. Burn's backends unwrap what their drivers return, partly on threads of their own.
///
/// For short work at the start of a program; see [`panics::catch_everywhere`].
///
/// # Errors
///
/// The first panic's message, in one line.
pub fn catch<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    panics::catch_everywhere(work)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_its_message_in_one_line() {
        let message = catch(|| panic!("no device\n   at index {}", 3)).unwrap_err();
        assert_eq!(message, "no device at index 3");
        assert_eq!(catch(|| 7), Ok(7));
    }

    #[test]
    fn the_first_panic_is_told_not_the_one_that_followed_from_it() {
        let message = catch(|| {
            let worker = std::thread::spawn(|| panic!("the driver refused"));
            worker.join().expect("the channel is closed");
        });
        assert_eq!(message.unwrap_err(), "the driver refused");
    }
}
