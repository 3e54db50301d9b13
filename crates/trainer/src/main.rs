//! The trainer. Everything is in the library; see `cli.rs`.

fn main() -> std::process::ExitCode {
    trainer::cli::main()
}
