//! Prints its arguments, and ends with the status given as the first one.

use libfluke::{println, startup};

/// The program.
pub fn main() -> u64 {
    for (i, arg) in startup::args().enumerate() {
        println!("arg {i}: {arg}");
    }
    for file in startup::files() {
        println!("file {}: {} bytes", file.name(), file.size);
    }
    startup::args()
        .nth(1)
        .and_then(|status| status.parse().ok())
        .unwrap_or(0)
}
