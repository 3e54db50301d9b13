//! The machine that a measurement was made on.

use serde::Serialize;

/// The properties that determine its speed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Machine {
    /// The processor's name; the architecture if the system does not report it.
    pub processor: String,
    /// Threads that this process may use.
    pub threads: usize,
    /// Bytes of main memory; `None` if the system does not report it.
    pub memory: Option<u64>,
    /// The relevant vector instructions.
    pub vectors: Vec<&'static str>,
    /// Operating system and architecture.
    pub system: String,
}

impl Machine {
    /// The machine of this process.
    pub fn this() -> Self {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        let (cpu, memory) = (read("/proc/cpuinfo"), read("/proc/meminfo"));
        let flags = field(&cpu, "flags").unwrap_or_default();
        let known = ["avx2", "avx512f", "avx512_bf16", "amx_bf16"];
        let has = |word: &&str| flags.split_whitespace().any(|flag| flag == *word);
        Self {
            processor: field(&cpu, "model name")
                .unwrap_or(std::env::consts::ARCH)
                .to_string(),
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            memory: field(&memory, "MemTotal").and_then(kibibytes),
            vectors: known.into_iter().filter(has).collect(),
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
        }
    }

    /// Whether the processor has bf16 multiplication; PyTorch is then faster in bf16.
    pub fn multiplies_bf16(&self) -> bool {
        let fast = ["avx512_bf16", "amx_bf16"];
        self.vectors.iter().any(|vector| fast.contains(vector))
    }
}

/// The value of `name : value` in the first such line.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim())
    })
}

fn kibibytes(value: &str) -> Option<u64> {
    let number: u64 = value.strip_suffix("kB")?.trim().parse().ok()?;
    number.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "model\t\t: 17\nmodel name\t: A CPU : fast\nMemTotal:       16 kB\n";
        assert_eq!(field(text, "model name"), Some("A CPU : fast"));
        assert_eq!(field(text, "MemTotal").and_then(kibibytes), Some(16_384));
        assert_eq!(field("", "MemTotal"), None);
        assert!(Machine::this().threads > 0);
    }
}
