//! Which vector instructions the processor has that this program runs on.
//!
//! `processor-features` prints those that the standard library detects, in one line, with the names of
//! `is_x86_feature_detected!` and `is_aarch64_feature_detected!`. `processor-features run NAME`
//! executes one instruction; a processor without that instruction ends the program with SIGILL.

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let ran = match arguments[..] {
        [] => {
            println!("{}", detected().join(" "));
            true
        }
        ["run", name] => run(name),
        _ => false,
    };
    if ran {
        return ExitCode::SUCCESS;
    }
    eprintln!("usage: processor-features [run avx2|fma|avx512f]");
    ExitCode::from(2)
}

#[cfg(target_arch = "x86_64")]
fn detected() -> Vec<&'static str> {
    let features = [
        ("sse4.2", is_x86_feature_detected!("sse4.2")),
        ("avx", is_x86_feature_detected!("avx")),
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("f16c", is_x86_feature_detected!("f16c")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512bw", is_x86_feature_detected!("avx512bw")),
        ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
    ];
    names(&features)
}

#[cfg(target_arch = "aarch64")]
fn detected() -> Vec<&'static str> {
    names(&[("neon", std::arch::is_aarch64_feature_detected!("neon"))])
}

fn names(features: &[(&'static str, bool)]) -> Vec<&'static str> {
    let there = features.iter().filter(|(_, detected)| *detected);
    there.map(|(name, _)| *name).collect()
}

/// Executes an instruction, whatever is detected. False if the name is unknown.
#[cfg(target_arch = "x86_64")]
fn run(name: &str) -> bool {
    // SAFETY: a processor without the instruction raises SIGILL, which is what the caller asks about.
    match name {
        "avx2" => unsafe { x86::avx2() },
        "fma" => unsafe { x86::fma() },
        "avx512f" => unsafe { x86::avx512f() },
        _ => return false,
    }
    true
}

#[cfg(target_arch = "aarch64")]
fn run(_: &str) -> bool {
    false
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    #[target_feature(enable = "avx2")]
    pub fn avx2() {
        let one = black_box(_mm256_set1_epi32(black_box(1)));
        black_box(_mm256_add_epi32(one, one));
    }

    #[target_feature(enable = "avx,fma")]
    pub fn fma() {
        let two = black_box(_mm256_set1_ps(black_box(2.0)));
        black_box(_mm256_fmadd_ps(two, two, two));
    }

    #[target_feature(enable = "avx512f")]
    pub fn avx512f() {
        let one = black_box(_mm512_set1_epi32(black_box(1)));
        black_box(_mm512_add_epi32(one, one));
    }
}
