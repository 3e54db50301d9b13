//! Panics of other people's code, caught and turned into messages.
//!
//! Burn's backends, drivers and parsers report failures as panics, partly on threads of their own.
//! Rust has one panic hook per process. This crate owns that hook, so that several catchers can be
//! active at the same time:
//!
//! | function | catches |
//! | --- | --- |
//! | [`catch`] | panics of the calling thread |
//! | [`catch_everywhere`] | panics of all threads, for short work |
//! | [`watch`] | nothing: it passes panics to a function instead of printing them |
//!
//! A panic belongs to the innermost catcher of its own thread. A thread without a catcher belongs to
//! the newest [`watch`] or [`catch_everywhere`] of the process. Without any of them the panic is
//! printed as usual.

use std::any::Any;
use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe, PanicHookInfo};
use std::sync::{Arc, Mutex, Once, PoisonError};

thread_local! {
    /// How many calls of [`catch`] this thread is in, since its last [`catch_everywhere`].
    static CATCHING: Cell<usize> = const { Cell::new(0) };
    /// How many calls of [`catch_everywhere`] this thread is in.
    static EVERYWHERE: Cell<usize> = const { Cell::new(0) };
}

type See = dyn Fn(&PanicHookInfo<'_>) + Send + Sync;

/// Where panics go, the newest last.
static WATCHES: Mutex<Vec<Arc<See>>> = Mutex::new(Vec::new());

/// A panic as the hook saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Panic {
    /// The panic's message, in one line.
    pub message: String,
    /// The source file that panicked, as the compiler knew it. It survives stripping.
    pub file: Option<String>,
}

impl Panic {
    /// The panic that a hook is called for.
    pub fn of(info: &PanicHookInfo<'_>) -> Self {
        Self {
            message: message(info.payload()),
            file: info.location().map(|place| place.file().to_string()),
        }
    }
}

/// A panic's message, in one line.
pub fn message(payload: &dyn Any) -> String {
    let text = payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("it panicked without a message");
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Runs `work`; a panic of this thread becomes its message, and nothing is printed. Panics of other
/// threads are not affected.
///
/// Values that `work` was changing may be half changed after a panic. Use it where `work` only
/// reads, or where those values are dropped afterwards.
///
/// # Errors
///
/// The panic's message, in one line.
pub fn catch<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    own_the_hook();
    CATCHING.set(CATCHING.get() + 1);
    let outcome = panic::catch_unwind(AssertUnwindSafe(work));
    CATCHING.set(CATCHING.get() - 1);
    outcome.map_err(|payload| message(payload.as_ref()))
}

/// Runs `work`; if it panics, the first panic of any thread becomes the message, and nothing is
/// printed.
///
/// A backend works on threads of its own. When one of them panics, the caller's panic is only "the
/// channel is closed": the first panic seen is the cause.
///
/// A panic of an unrelated thread is printed only after `work`. This function is therefore for short
/// work. Calls from different threads take turns.
///
/// # Errors
///
/// The first panic's message, in one line.
pub fn catch_everywhere<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    static ONE_THREAD_AT_A_TIME: Mutex<()> = Mutex::new(());
    // The inner one of two nested calls is on the thread that holds the lock already.
    let _turn = (EVERYWHERE.get() == 0).then(|| {
        ONE_THREAD_AT_A_TIME
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    });
    let seen = Arc::new(Mutex::new(Vec::new()));
    let seen_by_hook = Arc::clone(&seen);
    let watch = watch(move |info| {
        let panic = (message(info.payload()), info.to_string());
        lock(&seen_by_hook).push(panic);
    });
    EVERYWHERE.set(EVERYWHERE.get() + 1);
    let catching = CATCHING.replace(0);
    let outcome = panic::catch_unwind(AssertUnwindSafe(work));
    CATCHING.set(catching);
    EVERYWHERE.set(EVERYWHERE.get() - 1);
    drop(watch);

    let mut seen = lock(&seen);
    match outcome {
        Ok(value) => {
            // `work` did not fail, so these panics are about something else.
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

/// Passes panics of all threads to `see` instead of printing them, as long as the returned value
/// lives. Panics inside of [`catch`] are not passed on.
///
/// `see` runs on the thread that panics, and must not panic itself.
pub fn watch(see: impl Fn(&PanicHookInfo<'_>) + Send + Sync + 'static) -> Watch {
    own_the_hook();
    let see: Arc<See> = Arc::new(see);
    lock(&WATCHES).push(Arc::clone(&see));
    Watch { see }
}

/// A [`watch`] that is active until it is dropped.
#[must_use = "dropping it ends the watch"]
pub struct Watch {
    see: Arc<See>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        // Not simply the last one: watches may end in any order.
        lock(&WATCHES).retain(|see| !Arc::ptr_eq(see, &self.see));
    }
}

/// Installs the hook, once. It stays for the rest of the process.
fn own_the_hook() {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(|| {
        let print = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if CATCHING.get() > 0 {
                return;
            }
            // The lock is not held while `see` runs, which may take locks of its own.
            let newest = lock(&WATCHES).last().cloned();
            match newest {
                Some(see) => see(info),
                None => print(info),
            }
        }));
    });
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::thread;

    /// The hook is the process's: tests that look at other threads' panics take turns.
    static TURN: Mutex<()> = Mutex::new(());

    fn elsewhere(text: &'static str) {
        let _ = thread::spawn(move || panic!("{text}")).join();
    }

    /// A watch, and what it saw.
    fn watched() -> (Watch, Arc<Mutex<Vec<Panic>>>) {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let pushed = Arc::clone(&seen);
        let watch = watch(move |info| lock(&pushed).push(Panic::of(info)));
        (watch, seen)
    }

    fn messages(seen: &Mutex<Vec<Panic>>) -> Vec<String> {
        lock(seen)
            .iter()
            .map(|panic| panic.message.clone())
            .collect()
    }

    #[test]
    fn a_panic_becomes_its_message_in_one_line_and_the_next_call_works() {
        let _turn = lock(&TURN);
        type Catch = fn(fn()) -> Result<(), String>;
        let catchers: [Catch; 2] = [|work| catch(work), |work| catch_everywhere(work)];
        for catch in catchers {
            let message = catch(|| panic!("no device\n   at index {}", 3)).unwrap_err();
            assert_eq!(message, "no device at index 3");
            assert_eq!(catch(|| ()), Ok(()));
        }
        let number = catch(|| panic::panic_any(7)).unwrap_err();
        assert_eq!(number, "it panicked without a message");
    }

    #[test]
    fn a_nested_catcher_takes_its_own_panic_and_the_outer_one_the_next() {
        let _turn = lock(&TURN);
        let inner = || catch(|| panic!("inner")).map_err(|text| text + ", caught");
        let kept = catch(|| inner().unwrap_err());
        assert_eq!(kept.unwrap(), "inner, caught");
        let outer = catch_everywhere(|| {
            assert_eq!(inner(), Err::<(), _>("inner, caught".to_string()));
            panic!("outer");
        });
        // Not "inner": it was caught before.
        assert_eq!(outer, Err::<(), _>("outer".to_string()));
        let everywhere = catch(|| {
            let nested = catch_everywhere(|| {
                elsewhere("the driver refused");
                panic!("the channel is closed")
            });
            assert_eq!(nested, Err::<(), _>("the driver refused".to_string()));
            // Two of the same kind do not wait for each other.
            let twice = catch_everywhere(|| catch_everywhere(|| panic!("twice")));
            assert_eq!(twice, Ok(Err::<(), _>("twice".to_string())));
            panic!("the last")
        });
        assert_eq!(everywhere, Err::<(), _>("the last".to_string()));
    }

    #[test]
    fn the_first_panic_of_any_thread_is_the_cause() {
        let _turn = lock(&TURN);
        let message = catch_everywhere(|| {
            let worker = thread::spawn(|| panic!("the driver refused"));
            worker.join().expect("the channel is closed");
        });
        assert_eq!(message.unwrap_err(), "the driver refused");
        // One thread's catcher is not another's.
        let (watch, seen) = watched();
        assert_eq!(catch(|| elsewhere("unrelated")), Ok(()));
        assert_eq!(messages(&seen), ["unrelated"]);
        drop(watch);
    }

    #[test]
    fn a_watch_sees_every_thread_but_not_what_is_caught_or_what_a_newer_one_sees() {
        let _turn = lock(&TURN);
        let (outer, seen_by_outer) = watched();
        elsewhere("one");
        let (inner, seen_by_inner) = watched();
        elsewhere("two");
        assert_eq!(catch(|| panic!("caught")), Err::<(), _>("caught".into()));
        let everywhere = catch_everywhere(|| panic!("caught as well"));
        assert_eq!(everywhere, Err::<(), _>("caught as well".into()));
        // In any order.
        drop(outer);
        elsewhere("three");
        drop(inner);
        assert_eq!(messages(&seen_by_outer), ["one"]);
        assert_eq!(messages(&seen_by_inner), ["two", "three"]);
        let file = lock(&seen_by_inner)[0].file.clone().unwrap();
        assert!(file.ends_with("lib.rs"), "{file}");
    }

    #[test]
    fn catchers_of_many_threads_keep_their_own_panics() {
        let _turn = lock(&TURN);
        let (watch, seen) = watched();
        let threads: Vec<_> = (0..8)
            .map(|number| {
                thread::spawn(move || {
                    for _ in 0..50 {
                        let own = format!("thread {number}");
                        let caught = catch(|| panic!("{own}"));
                        assert_eq!(caught, Err::<(), _>(own.clone()));
                        let caught = catch_everywhere(|| panic!("{own}"));
                        assert_eq!(caught, Err::<(), _>(own));
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(messages(&seen), [""; 0]);
        drop(watch);
    }

    #[test]
    fn calls_of_catch_everywhere_on_two_threads_take_turns() {
        let _turn = lock(&TURN);
        let (started, starts) = mpsc::channel();
        let (release, released) = mpsc::channel::<()>();
        let first = thread::spawn(move || {
            catch_everywhere(|| {
                started.send(()).unwrap();
                released.recv().unwrap();
                panic!("first")
            })
        });
        starts.recv().unwrap();
        let second = thread::spawn(|| catch_everywhere(|| panic!("second")));
        thread::sleep(std::time::Duration::from_millis(20));
        assert!(!second.is_finished(), "it waits for the first");
        release.send(()).unwrap();
        assert_eq!(first.join().unwrap(), Err::<(), _>("first".to_string()));
        assert_eq!(second.join().unwrap(), Err::<(), _>("second".to_string()));
    }
}
