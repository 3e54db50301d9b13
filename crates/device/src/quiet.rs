//! Panics of other people's code, turned into messages.

use std::any::Any;
use std::panic::{self, AssertUnwindSafe, PanicHookInfo};
use std::sync::{Arc, Mutex, PoisonError};

/// Runs `work`; a panic inside it, on whatever thread, becomes a message instead of a report on the
/// screen.
///
/// Burn's backends unwrap what their drivers return, partly on threads of their own: the caller's
/// panic is then only "the channel is closed", and the first panic seen is the one that says what
/// went wrong.
///
/// The hook is the process's: a panic of an unrelated thread is reported only after `work`. It is
/// therefore for short work at the start of a program.
pub fn catch<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    // One at a time, or two callers would restore each other's hook.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);

    let seen = Arc::new(Mutex::new(Vec::new()));
    let seen_by_hook = Arc::clone(&seen);
    let reporting = panic::take_hook();
    panic::set_hook(Box::new(move |info: &PanicHookInfo<'_>| {
        let panic = (message(info.payload()), info.to_string());
        let mut seen = seen_by_hook.lock().unwrap_or_else(PoisonError::into_inner);
        seen.push(panic);
    }));
    let outcome = panic::catch_unwind(AssertUnwindSafe(work));
    panic::set_hook(reporting);

    let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
    match outcome {
        Ok(value) => {
            // Nothing of ours: reported late rather than never.
            for (_, report) in seen.drain(..) {
                eprintln!("{report}");
            }
            Ok(value)
        }
        Err(payload) => Err(match seen.drain(..).next() {
            Some((first, _)) => first,
            None => message(payload.as_ref()),
        }),
    }
}

/// A panic's words, in one line.
fn message(payload: &dyn Any) -> String {
    let text = payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("it panicked without a message");
    text.split_whitespace().collect::<Vec<_>>().join(" ")
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
