//! Progress lines while a GPU's kernels are compiled and tuned, which takes minutes.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use device::KeptKernels;
use terminal::human;

/// Reports from time to time how many kernels are ready, until it is dropped.
pub struct Preparing {
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Preparing {
    /// Calls `kernels` at every interval and reports the counts to `tell`, after the text `what`.
    pub fn new(
        what: &'static str,
        every: Duration,
        kernels: impl Fn() -> Option<KeptKernels> + Send + 'static,
        tell: impl Fn(String) + Send + 'static,
    ) -> Self {
        let (end, ended) = channel();
        let thread = thread::Builder::new()
            .name("preparing".into())
            .spawn(move || {
                let (started, before) = (Instant::now(), kernels().unwrap_or_default());
                while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(every) {
                    if let Some(now) = kernels() {
                        tell(text(what, now.since(before), started.elapsed()));
                    }
                }
            });
        Self {
            end: Some(end),
            // Without a thread nothing is reported, and the run continues.
            thread: thread.ok(),
        }
    }
}

impl Drop for Preparing {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// `preparing kernels: 14 tuned, 212 compiled, 1:05 so far`
fn text(what: &str, new: KeptKernels, elapsed: Duration) -> String {
    format!(
        "{what}: {} tuned, {} compiled, {} so far",
        human::count(new.tuned),
        human::count(new.compiled),
        human::clock(elapsed)
    )
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn what_is_new_is_said_until_it_is_dropped() {
        let said = Arc::new(Mutex::new(Vec::new()));
        let asked = Mutex::new(0);
        let kernels = move || {
            let mut asked = asked.lock().unwrap();
            *asked += 1;
            Some(KeptKernels {
                tuned: 10 + *asked,
                compiled: 100,
            })
        };
        let told = said.clone();
        let tell = move |text| told.lock().unwrap().push(text);
        let every = Duration::from_millis(1);
        let preparing = Preparing::new("preparing kernels", every, kernels, tell);
        while said.lock().unwrap().len() < 2 {
            thread::yield_now();
        }
        drop(preparing);
        let said = said.lock().unwrap();
        assert!(
            said[0].starts_with("preparing kernels: 1 tuned, 0 compiled, "),
            "{said:?}"
        );
        assert!(
            said[1].starts_with("preparing kernels: 2 tuned, "),
            "{said:?}"
        );
    }
}
