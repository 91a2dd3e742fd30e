//! Builds every guest image and embeds it, so that one `flukevm` binary is complete.
//!
//! Guest code wants other flags than the host's, so it is compiled by a nested cargo with flags,
//! target directory and environment of its own. What it makes is copied to `OUT_DIR` under names
//! that say what it is, and `images.rs` there lists it for `src/image.rs`.
//!
//! `FLUKEVM_GUESTS=skip` leaves the images out, for work on the host side alone.

#[path = "build/header.rs"]
mod header;
#[path = "build/nested.rs"]
mod nested;

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::{env, fs};

use nested::{Failure, Guest};

/// Kernel images by name, with the features of the kernel crate.
const KERNELS: [(&str, &str); 3] = [
    ("process", "process"),
    ("process-full", "process,full"),
    ("interrupt", "interrupt"),
];

/// The same of kernels that are only there to be measured.
const VARIANTS: [(&str, &str); 1] = [("interrupt-copied", "interrupt,copied-frame")];

/// Packages with guest programs, by name and directory in the workspace.
const PROGRAMS: [(&str, &str); 3] = [
    ("fluke-programs", "tools/programs"),
    ("fluke-checkpoint", "tools/checkpoint"),
    ("fluke-benchmarks", "benches/guest"),
];

/// What the images depend on, in the workspace.
const SOURCES: [&str; 10] = [
    "guest-kernel",
    "abi",
    "tools/libfluke",
    "tools/programs",
    "tools/checkpoint",
    "tools/c",
    "benches/guest",
    "Cargo.lock",
    "Cargo.toml",
    "rust-toolchain.toml",
];

fn main() {
    if let Err(failure) = build() {
        eprintln!("{failure}");
        println!(
            "cargo::error=a guest image does not build (its output is below); mend it, or set \
             FLUKEVM_GUESTS=skip to build the host side without guests"
        );
        std::process::exit(1);
    }
}

fn build() -> Result<(), Failure> {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let root = Path::new(&env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"))
        .parent()
        .expect("vmm/ is in the workspace")
        .to_path_buf();
    for source in SOURCES {
        println!("cargo::rerun-if-changed={}", root.join(source).display());
    }
    for source in ["build.rs", "build"] {
        println!("cargo::rerun-if-changed={source}");
    }
    println!("cargo::rerun-if-env-changed=FLUKEVM_GUESTS");

    fs::write(out.join("fluke.h"), header::generate()).map_err(Failure::io("fluke.h"))?;
    let (mut kernels, mut mutants, mut programs) = (Vec::new(), Vec::new(), Vec::new());
    if env::var("FLUKEVM_GUESTS").as_deref() == Ok("skip") {
        println!("cargo::warning=FLUKEVM_GUESTS=skip: no guest image is embedded");
    } else {
        let guest = Guest::new(&root, &out)?;
        let checks = match env::var("PROFILE").as_deref() {
            Ok("debug") => ",lock-checker",
            _ => "",
        };
        for (name, features) in KERNELS.into_iter().chain(VARIANTS) {
            let image = guest.kernel(name, &format!("image,{features}{checks}"))?;
            kernels.push((name.to_string(), image));
        }
        for (name, features) in KERNELS {
            if env::var_os("CARGO_FEATURE_MUTANTS").is_some() {
                let image = format!("{name}-mutants");
                let image = guest.kernel(&image, &format!("image,{features},mutants"))?;
                mutants.push((name.to_string(), image));
            }
        }
        programs = guest.rust_programs(&PROGRAMS)?;
        programs.extend(guest.c_programs()?);
        programs.sort();
    }
    let mut list = String::new();
    table(&mut list, "KERNELS", "Kernel images by name.", &kernels);
    table(
        &mut list,
        "MUTANTS",
        "The same with bugs to choose from.",
        &mutants,
    );
    table(&mut list, "PROGRAMS", "Guest programs by name.", &programs);
    fs::write(out.join("images.rs"), list).map_err(Failure::io("images.rs"))
}

/// Writes a table of names and embedded files as Rust source.
fn table(list: &mut String, name: &str, doc: &str, entries: &[(String, PathBuf)]) {
    let _ = writeln!(list, "/// {doc}\npub static {name}: &[(&str, &[u8])] = &[");
    for (entry, path) in entries {
        let _ = writeln!(list, "    ({entry:?}, include_bytes!({path:?})),");
    }
    let _ = writeln!(list, "];");
}
