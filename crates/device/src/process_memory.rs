//! The memory of this process in physical pages, which determines whether a run fits a machine.
//!
//! GPU memory is not included; see [`crate::memory_reserved`].

/// Resident memory of this process, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ResidentMemory {
    /// Now.
    pub current: u64,
    /// The peak since the process started.
    pub peak: u64,
}

/// The operating system's figures for this process; `None` if it does not report them.
///
/// A peak below the current size, which some systems report between two updates, is raised to it.
pub fn resident() -> Option<ResidentMemory> {
    let ResidentMemory { current, peak } = platform::resident()?;
    let peak = peak.max(current);
    Some(ResidentMemory { current, peak })
}

/// The peak of [`resident`], 0 where it is unknown.
pub fn peak() -> u64 {
    resident().map_or(0, |memory| memory.peak)
}

/// Bytes that this process can use: the system's free memory, within the limit of the process's
/// container, plus what the process already has. `None` if it is unknown.
pub fn available() -> Option<u64> {
    platform::free().map(|free| free + resident().map_or(0, |memory| memory.current))
}

#[cfg(target_os = "linux")]
mod platform {
    use super::ResidentMemory;

    pub fn resident() -> Option<ResidentMemory> {
        parse(&std::fs::read_to_string("/proc/self/status").ok()?)
    }

    /// `MemAvailable` (proc_meminfo(5)), and the rest of the control group's `memory.max`.
    pub fn free() -> Option<u64> {
        let read = |path: &str| std::fs::read_to_string(path).ok();
        let system = available(&read("/proc/meminfo")?)?;
        let bytes = |path: &str| read(path)?.trim().parse::<u64>().ok();
        let limit = bytes("/sys/fs/cgroup/memory.max");
        let used = bytes("/sys/fs/cgroup/memory.current");
        let left = limit
            .zip(used)
            .map(|(limit, used)| limit.saturating_sub(used));
        Some(left.map_or(system, |left| left.min(system)))
    }

    /// `MemAvailable:   12345 kB`.
    pub fn available(meminfo: &str) -> Option<u64> {
        let line = meminfo
            .lines()
            .find_map(|line| line.strip_prefix("MemAvailable:"))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        kib.checked_mul(1024)
    }

    /// `VmHWM:     12345 kB`, where kB means 1,024 bytes (proc_pid_status(5)).
    pub fn parse(status: &str) -> Option<ResidentMemory> {
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            let kib: u64 = line.strip_suffix("kB")?.trim().parse().ok()?;
            kib.checked_mul(1024)
        };
        let (current, peak) = (field("VmRSS:")?, field("VmHWM:")?);
        Some(ResidentMemory { current, peak })
    }
}

#[cfg(all(unix, not(target_os = "linux")))]
mod platform {
    use super::ResidentMemory;

    pub fn free() -> Option<u64> {
        None
    }

    pub fn resident() -> Option<ResidentMemory> {
        let current = memory_stats::memory_stats()?.physical_mem as u64;
        let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
        // SAFETY: the pointer is to a whole rusage, which getrusage fills.
        let result = unsafe { libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()) };
        let peak = match result {
            // SAFETY: every field is an integer, set by getrusage or zero.
            0 => unsafe { usage.assume_init() }.ru_maxrss as u64,
            _ => 0,
        };
        // Apple counts bytes, every other system KiB.
        let unit = if cfg!(target_vendor = "apple") {
            1
        } else {
            1024
        };
        let peak = peak.saturating_mul(unit);
        Some(ResidentMemory { current, peak })
    }
}

#[cfg(windows)]
mod platform {
    use windows_sys::Win32::System::ProcessStatus::{
        GetProcessMemoryInfo, PROCESS_MEMORY_COUNTERS,
    };
    use windows_sys::Win32::System::Threading::GetCurrentProcess;

    use super::ResidentMemory;

    pub fn free() -> Option<u64> {
        None
    }

    pub fn resident() -> Option<ResidentMemory> {
        let size = size_of::<PROCESS_MEMORY_COUNTERS>() as u32;
        let mut counters = PROCESS_MEMORY_COUNTERS {
            cb: size,
            ..Default::default()
        };
        // SAFETY: the structure is a whole one and its size is given with it.
        let filled = unsafe { GetProcessMemoryInfo(GetCurrentProcess(), &mut counters, size) };
        (filled != 0).then_some(ResidentMemory {
            current: counters.WorkingSetSize as u64,
            peak: counters.PeakWorkingSetSize as u64,
        })
    }
}

#[cfg(not(any(unix, windows)))]
mod platform {
    pub fn free() -> Option<u64> {
        None
    }

    pub fn resident() -> Option<super::ResidentMemory> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_stays_after_memory_is_given_back() {
        let Some(before) = resident() else {
            return;
        };
        assert!(before.current > 0 && before.peak >= before.current);
        // Larger than what other tests of this process free in the meantime.
        let size = 256 << 20;
        let block = vec![1u8; size];
        let during = resident().unwrap();
        std::hint::black_box(&block);
        drop(block);
        // The kernel's counters may be some pages behind.
        let least = size as u64 - (1 << 20);
        assert!(during.current >= least && during.peak >= least);
        assert!(resident().unwrap().peak >= least);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn what_is_free_is_read_from_the_kernels_table() {
        let table = "MemTotal:  100 kB\nMemAvailable:    2048 kB\n";
        assert_eq!(platform::available(table), Some(2 << 20));
        assert_eq!(platform::available("MemAvailable: 5"), None);
        assert!(available().is_some_and(|bytes| bytes > 1 << 20));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_status_file_without_the_lines_is_unknown_not_a_panic() {
        let whole = "Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n";
        let expected = ResidentMemory {
            current: 1 << 20,
            peak: 2 << 20,
        };
        assert_eq!(platform::parse(whole), Some(expected));
        for broken in [
            "",
            "VmRSS: 1 kB",
            "VmHWM: x kB\nVmRSS: 1 kB",
            "VmHWM: 1\nVmRSS: 1",
        ] {
            assert_eq!(platform::parse(broken), None, "{broken}");
        }
    }
}
