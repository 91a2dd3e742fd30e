//! The command `flukevm`.

use std::process::ExitCode;

fn main() -> ExitCode {
    flukevm::cli::main()
}
