//! The nested builds: cargo for kernels and Rust programs, gcc for C programs.

use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The one target there is; its flags make it freestanding.
const TARGET: &str = "x86_64-unknown-linux-gnu";
const PROFILE: &str = "guest";

/// Why a guest image could not be built.
pub enum Failure {
    /// A command failed; what it printed on stderr.
    Command { what: String, stderr: String },
    /// A file could not be handled.
    Io { what: String, error: io::Error },
}

impl Failure {
    /// For `map_err`: a failure about the file or program `what`.
    pub fn io(what: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let what = what.as_ref().display().to_string();
        move |error| Self::Io { what, error }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Command { what, stderr } => write!(f, "{what} failed:\n{stderr}"),
            Self::Io { what, error } => write!(f, "{what}: {error}"),
        }
    }
}

/// Guest builds of one workspace.
pub struct Guest<'a> {
    root: &'a Path,
    out: &'a Path,
    /// Two build scripts at once (a debug and a release build, say) would copy each other's
    /// kernels, since all models end in a file of the same name.
    _lock: File,
}

impl<'a> Guest<'a> {
    /// Prepares builds in the workspace `root` with results in `out`.
    pub fn new(root: &'a Path, out: &'a Path) -> Result<Self, Failure> {
        let target = root.join("target");
        fs::create_dir_all(&target).map_err(Failure::io(&target))?;
        let path = target.join("guest.lock");
        let lock = File::create(&path).map_err(Failure::io(&path))?;
        lock.lock().map_err(Failure::io(&path))?;
        Ok(Self {
            root,
            out,
            _lock: lock,
        })
    }

    /// Builds the kernel with the given features as the image `name`.
    pub fn kernel(&self, name: &str, features: &str) -> Result<PathBuf, Failure> {
        let mut flags = common_flags(&self.root.join("guest-kernel/kernel.ld"));
        flags.extend(
            [
                // No SSE in the kernel: user state stays in the registers, and a host that
                // emulates CPL 0 code cannot execute it.
                "-Ctarget-feature=-sse,-sse2,+soft-float",
                "-Ccode-model=kernel",
                "-Cno-redzone=yes",
            ]
            .map(String::from),
        );
        let directory = self.cargo(
            &format!("building the {name} kernel"),
            "target/guest",
            &flags,
            &[
                "-p",
                "fluke-kernel",
                "--bin",
                "fluke-kernel",
                "--features",
                features,
            ],
        )?;
        self.keep(&directory.join("fluke-kernel"), &format!("kernel-{name}"))
    }

    /// Builds the Rust programs: each `src/bin/*.rs` of the packages in these directories, by package
    /// name.
    pub fn rust_programs(
        &self,
        packages: &[(&str, &str)],
    ) -> Result<Vec<(String, PathBuf)>, Failure> {
        let (mut names, mut arguments) = (Vec::new(), vec!["--bins", "--features"]);
        let features: Vec<_> = packages
            .iter()
            .map(|(name, _)| format!("{name}/guest"))
            .collect();
        let features = features.join(",");
        arguments.push(&features);
        for (name, directory) in packages {
            names.extend(stems(&self.root.join(directory).join("src/bin"), "rs")?);
            arguments.extend(["-p", name]);
        }
        let directory = self.cargo(
            "building the guest programs",
            "target/guest-programs",
            &common_flags(&self.program_script()),
            &arguments,
        )?;
        names
            .into_iter()
            .map(|name| {
                let kept = self.keep(&directory.join(&name), &format!("program-{name}"))?;
                Ok((name, kept))
            })
            .collect()
    }

    /// Builds each `tools/c/*.c` with the assembly files beside it and the generated header.
    pub fn c_programs(&self) -> Result<Vec<(String, PathBuf)>, Failure> {
        let directory = self.root.join("tools/c");
        if !directory.is_dir() {
            return Ok(Vec::new());
        }
        let assembly = stems(&directory, "S")?;
        let mut programs = Vec::new();
        for name in stems(&directory, "c")? {
            let output = self.out.join(format!("program-{name}"));
            let mut gcc = Command::new("gcc");
            gcc.args([
                "-std=c11",
                "-ffreestanding",
                "-fno-stack-protector",
                "-fno-pic",
                "-no-pie",
                "-static",
                "-nostdlib",
                "-O2",
                "-g",
                "-fno-omit-frame-pointer",
                "-fno-asynchronous-unwind-tables",
                "-Wall",
                "-Wextra",
                "-Werror",
                "-Wl,-z,max-page-size=4096",
                "-Wl,-z,noexecstack",
                "-Wl,--build-id=none",
            ])
            .arg(format!("-Wl,-T,{}", self.program_script().display()))
            .arg("-I")
            .arg(self.out)
            .arg("-I")
            .arg(&directory)
            .arg("-o")
            .arg(&output)
            .arg(directory.join(format!("{name}.c")))
            .args(assembly.iter().map(|s| directory.join(format!("{s}.S"))));
            run(&format!("building the C program {name} with gcc"), &mut gcc)?;
            programs.push((name, output));
        }
        Ok(programs)
    }

    fn program_script(&self) -> PathBuf {
        self.root.join("tools/programs/program.ld")
    }

    /// Runs cargo and returns the directory with the executables.
    fn cargo(
        &self,
        what: &str,
        target_dir: &str,
        flags: &[String],
        arguments: &[&str],
    ) -> Result<PathBuf, Failure> {
        let target_dir = self.root.join(target_dir);
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
        cargo
            .current_dir(self.root)
            .args(["build", "--locked", "--quiet", "--profile", PROFILE])
            .args(["--target", TARGET, "--target-dir"])
            .arg(&target_dir)
            .args(arguments);
        for (name, _) in std::env::vars_os() {
            if !kept_for_child(&name) {
                cargo.env_remove(name);
            }
        }
        cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
        run(what, &mut cargo)?;
        Ok(target_dir.join(TARGET).join(PROFILE))
    }

    /// Copies an image out of the target directory, where the next build may replace it.
    fn keep(&self, from: &Path, name: &str) -> Result<PathBuf, Failure> {
        let to = self.out.join(name);
        fs::copy(from, &to).map_err(Failure::io(from))?;
        Ok(to)
    }
}

/// Flags of every guest image.
fn common_flags(script: &Path) -> Vec<String> {
    let mut flags = [
        "-Crelocation-model=static",
        "-Cforce-frame-pointers=yes",
        "-Clinker=rust-lld",
        "-Clinker-flavor=ld.lld",
        "-Cdefault-linker-libraries=no",
        "-Clink-arg=-static",
        "-Clink-arg=--no-eh-frame-hdr",
        "-Clink-arg=--build-id=sha1",
        "-Clink-arg=-z",
        "-Clink-arg=max-page-size=4096",
    ]
    .map(String::from)
    .to_vec();
    flags.push(format!("-Clink-arg=-T{}", script.display()));
    flags
}

/// Whether the nested cargo may see an environment variable. What the outer cargo set for this
/// script (and clippy's wrapper) would change the guest; how to reach the registry must stay.
fn kept_for_child(name: &OsStr) -> bool {
    const KEPT: [&str; 8] = [
        "CARGO_HOME",
        "CARGO_NET_",
        "CARGO_HTTP_",
        "CARGO_REGISTR",
        "CARGO_SOURCE_",
        "CARGO_TERM_",
        "RUSTUP_HOME",
        "RUSTUP_TOOLCHAIN",
    ];
    const DROPPED: [&str; 12] = [
        "CARGO",
        "RUST",
        "LD_LIBRARY_PATH",
        "DEP_",
        "OUT_DIR",
        "TARGET",
        "HOST",
        "NUM_JOBS",
        "OPT_LEVEL",
        "PROFILE",
        "DEBUG",
        "MAKEFLAGS",
    ];
    let name = name.to_string_lossy();
    KEPT.iter().any(|k| name.starts_with(k)) || !DROPPED.iter().any(|d| name.starts_with(d))
}

/// Names without extension of the files in `directory` that have it, sorted.
fn stems(directory: &Path, extension: &str) -> Result<Vec<String>, Failure> {
    if !directory.is_dir() {
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).map_err(Failure::io(directory))? {
        let path = entry.map_err(Failure::io(directory))?.path();
        if path.extension() == Some(OsStr::new(extension))
            && let Some(stem) = path.file_stem().and_then(OsStr::to_str)
        {
            names.push(stem.to_string());
        }
    }
    names.sort();
    Ok(names)
}

fn run(what: &str, command: &mut Command) -> Result<(), Failure> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(Failure::io(command.get_program()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(Failure::Command {
        what: what.to_string(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}
