//! What a machine is made of: [`VmConfig`], and the parsing of what users write.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fluke_abi::mutant::Mutant;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::image;
use crate::snapshot::Snapshot;

/// Bytes in a mebibyte.
pub const MIB: u64 = 1 << 20;
/// Least memory of a machine, bytes.
pub const MEMORY_MIN: u64 = 16 * MIB;
/// Most memory of a machine, bytes: physical addresses above belong to the interrupt controllers.
pub const MEMORY_MAX: u64 = 3 << 30;
/// Memory of a machine nobody gave a size, bytes.
pub const MEMORY_DEFAULT: u64 = 64 * MIB;
/// The program to run when none is named.
pub const PROGRAM_DEFAULT: &str = "tour";

/// Execution model of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Model {
    /// A kernel stack for every thread; a sleeping call keeps its stack.
    Process,
    /// A kernel stack for every CPU; a sleeping call is started again from its registers.
    Interrupt,
}

impl Model {
    /// Name of the model.
    pub fn name(self) -> &'static str {
        match self {
            Self::Process => "process",
            Self::Interrupt => "interrupt",
        }
    }
}

/// How far kernel code can be preempted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Preempt {
    /// Nowhere.
    None,
    /// At one point on the IPC copy path.
    Partial,
    /// Everywhere; needs kernel locks that sleep.
    Full,
}

impl fmt::Display for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// As on the command line.
impl fmt::Display for Preempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Partial => "partial",
            Self::Full => "full",
        })
    }
}

/// A configuration of the kernel: an execution model and a preemption level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Configuration {
    model: Model,
    preempt: Preempt,
}

impl Configuration {
    /// All that there are.
    pub const ALL: [Self; 5] = [
        Self::of(Model::Process, Preempt::None),
        Self::of(Model::Process, Preempt::Partial),
        Self::of(Model::Process, Preempt::Full),
        Self::of(Model::Interrupt, Preempt::None),
        Self::of(Model::Interrupt, Preempt::Partial),
    ];

    const fn of(model: Model, preempt: Preempt) -> Self {
        Self { model, preempt }
    }

    /// The configuration of that model and preemption level.
    ///
    /// # Errors
    /// If there can be no such kernel.
    pub fn new(model: Model, preempt: Preempt) -> Result<Self, Error> {
        match (model, preempt) {
            (Model::Interrupt, Preempt::Full) => Err(Error::Config(
                "--preempt full cannot go with --model interrupt: full preemption needs kernel \
                 code that can sleep holding a lock, and an interrupt-model kernel keeps no stack \
                 to sleep on; use --model process"
                    .into(),
            )),
            _ => Ok(Self { model, preempt }),
        }
    }

    /// Name of the kernel image.
    pub fn image(self) -> &'static str {
        match (self.model, self.preempt) {
            (Model::Process, Preempt::Full) => "process-full",
            (model, _) => model.name(),
        }
    }

    /// The execution model.
    pub fn model(self) -> Model {
        self.model
    }

    /// The preemption level.
    pub fn preempt(self) -> Preempt {
        self.preempt
    }
}

/// As in the paper: `interrupt-np`.
impl FromStr for Configuration {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = Self::ALL.map(|configuration| configuration.to_string());
        let at = all.iter().position(|name| name == text);
        at.map(|at| Self::ALL[at])
            .ok_or_else(|| format!("there are {}", all.join(", ")))
    }
}

impl fmt::Display for Configuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let preempt = match self.preempt {
            Preempt::None => "np",
            Preempt::Partial => "pp",
            Preempt::Full => "fp",
        };
        write!(f, "{}-{preempt}", self.model.name())
    }
}

/// Where the guest's console goes.
#[derive(Clone, Debug)]
pub enum ConsoleSink {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// Memory.
    Buffer(Arc<Mutex<Vec<u8>>>),
}

impl ConsoleSink {
    /// A new empty buffer.
    pub fn buffer() -> Self {
        Self::Buffer(Arc::default())
    }
}

/// A file for the guest.
#[derive(Clone, Debug)]
pub struct GuestFile {
    /// Name by which the guest finds it.
    pub name: String,
    /// Contents.
    pub data: Vec<u8>,
}

impl GuestFile {
    /// A program: the embedded one of that name, or the file of that path.
    ///
    /// # Errors
    /// If there is neither, or it cannot be read.
    pub fn program(name_or_path: &str) -> Result<Self, Error> {
        let name = Path::new(name_or_path).file_name();
        Ok(Self {
            name: name.map_or(name_or_path.into(), |n| n.to_string_lossy().into_owned()),
            data: image::program(name_or_path)?,
        })
    }
}

/// What the machine runs.
#[derive(Clone, Debug)]
pub enum Guest {
    /// The Fluke kernel with a program.
    Fluke {
        /// ELF image of the kernel.
        kernel: Vec<u8>,
        /// What it was built for.
        configuration: Configuration,
        /// ELF image of the root program.
        root: Vec<u8>,
        /// The program that the root program runs.
        program: GuestFile,
        /// The program's arguments, without its name.
        args: Vec<String>,
        /// Further files.
        files: Vec<GuestFile>,
        /// The bug that the kernel is to have, see [`VmConfig::mutate`].
        mutant: Mutant,
    },
    /// Raw code, for tests and probes: loaded at [`crate::boot::FLAT_BASE`] and entered there at
    /// CPL 0 in long mode with all memory mapped at its physical address, readable, writable and
    /// executable.
    Flat(Vec<u8>),
    /// A machine that was saved, which goes on. It has the vCPUs and the memory that it had.
    Snapshot(Snapshot),
}

/// A machine to build.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// Number of vCPUs, at least 1.
    pub vcpus: u32,
    /// Memory, bytes, a multiple of the page size.
    pub memory: u64,
    /// What runs.
    pub guest: Guest,
    /// The machine is stopped when it has run for so long.
    pub timeout: Option<Duration>,
    /// Where the guest's console goes.
    pub console: ConsoleSink,
    /// Whether SIGINT and SIGTERM stop the machine. They stay as they were otherwise.
    pub signals: bool,
    /// How often to sample what every vCPU is doing, for the share of time in the kernel.
    pub sampling: Option<Duration>,
    /// Whether to count the kernel's instructions, see [`crate::count`]. Needs one vCPU.
    pub count: bool,
    /// Whether to note where they are as well, see [`crate::profile`].
    pub profile: bool,
    /// The file that the guest can write, see [`crate::store`].
    pub store: Option<PathBuf>,
    /// What the guest's clock shows at first, nanoseconds.
    pub clock: u64,
    /// How many times slower than the host's the guest takes its clock to be.
    pub(crate) slowness: u32,
}

impl VmConfig {
    /// One vCPU with the default memory, no timeout, the console in a buffer.
    pub fn new(guest: Guest) -> Self {
        Self {
            vcpus: 1,
            memory: MEMORY_DEFAULT,
            guest,
            timeout: None,
            console: ConsoleSink::buffer(),
            signals: false,
            sampling: None,
            count: false,
            profile: false,
            store: None,
            clock: 0,
            slowness: 1,
        }
    }

    /// The embedded kernel of that configuration with a program: the name of an embedded one, or
    /// the path of an ELF.
    ///
    /// # Errors
    /// If there is no such kernel, or the program cannot be read or is none.
    pub fn fluke(
        configuration: Configuration,
        program: &str,
        args: &[String],
    ) -> Result<Self, Error> {
        Ok(Self::new(Guest::Fluke {
            kernel: image::kernel(configuration.image())?.to_vec(),
            configuration,
            root: image::program("root")?,
            program: GuestFile::program(program)?,
            args: args.to_vec(),
            files: Vec::new(),
            mutant: Mutant::none,
        }))
    }

    /// The same with the kernel that has bugs to choose from, and that one, if it runs Fluke.
    ///
    /// # Errors
    /// If this build has no such kernel.
    pub fn mutate(mut self, bug: Mutant) -> Result<Self, Error> {
        if let Guest::Fluke {
            kernel,
            configuration,
            mutant,
            ..
        } = &mut self.guest
        {
            *kernel = image::mutants(configuration.image())?.to_vec();
            *mutant = bug;
        }
        Ok(self)
    }

    /// The same with the embedded kernel of that name, which is a variant of the configuration's, if it runs
    /// Fluke.
    ///
    /// # Errors
    /// If this build has no such kernel.
    pub fn variant(mut self, name: &str) -> Result<Self, Error> {
        if let Guest::Fluke { kernel, .. } = &mut self.guest {
            *kernel = image::kernel(name)?.to_vec();
        }
        Ok(self)
    }

    /// The machine of a snapshot.
    pub fn snapshot(snapshot: Snapshot) -> Self {
        Self {
            vcpus: snapshot.vcpus(),
            memory: snapshot.memory_size(),
            ..Self::new(Guest::Snapshot(snapshot))
        }
    }

    /// The same with that number of vCPUs.
    #[must_use]
    pub fn vcpus(mut self, vcpus: u32) -> Self {
        self.vcpus = vcpus;
        self
    }

    /// The same with that much memory, bytes.
    #[must_use]
    pub fn memory(mut self, bytes: u64) -> Self {
        self.memory = bytes;
        self
    }

    /// The same with a timeout.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// The same with a clock that goes so many times slower: for a guest that is stepped through, whose time
    /// slices would end in the middle of calls, or not, as fast as the host is.
    #[must_use]
    pub fn slower(mut self, times: u32) -> Self {
        self.slowness = times.max(1);
        self
    }

    /// The same with one more file for the guest. Flat guests have no files.
    #[must_use]
    pub fn file(mut self, name: &str, contents: Vec<u8>) -> Self {
        if let Guest::Fluke { files, .. } = &mut self.guest {
            files.push(GuestFile {
                name: name.into(),
                data: contents,
            });
        }
        self
    }
}

/// A size in bytes as a user writes it: `64M`, `1GiB`, `4096`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let shift = match unit.trim().to_ascii_lowercase().trim_end_matches("ib") {
            "" | "b" => 0,
            "k" | "kb" => 10,
            "m" | "mb" => 20,
            "g" | "gb" => 30,
            _ => {
                return Err(format!(
                    "`{unit}` is not a unit; write a size such as 64M or 1G"
                ));
            }
        };
        number
            .parse::<u64>()
            .ok()
            .and_then(|n| n.checked_mul(1 << shift))
            .map(Self)
            .ok_or_else(|| format!("`{text}` is not a size; write one such as 64M or 1G"))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            n if n >= 1 << 30 && n % (1 << 30) == 0 => write!(f, "{} GiB", n >> 30),
            n if n >= MIB && n % MIB == 0 => write!(f, "{} MiB", n >> 20),
            n if n >= 1024 && n % 1024 == 0 => write!(f, "{} KiB", n >> 10),
            n => write!(f, "{n} bytes"),
        }
    }
}

/// Splits a `NAME=PATH`.
///
/// # Errors
/// If a part is missing.
pub fn name_and_path(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && !path.is_empty() => {
            Ok((name.into(), path.into()))
        }
        _ => Err(format!(
            "`{text}` is not NAME=PATH; write for example data=./file.bin"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [
            ("4096", 4096),
            ("1K", 1024),
            ("64M", 64 * MIB),
            ("64MiB", 64 * MIB),
            ("2gb", 2 << 30),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in [
            "",
            "M",
            "-1",
            "1.5G",
            "12X",
            "99999999999999999999",
            "99999999999G",
        ] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
        assert_eq!(Size(1024).to_string(), "1 KiB");
        assert_eq!(Size(MEMORY_MIN).to_string(), "16 MiB");
    }

    #[test]
    fn names_and_paths_are_both_needed() {
        assert_eq!(name_and_path("a=b=c"), Ok(("a".into(), "b=c".into())));
        for text in ["", "a", "=b", "a="] {
            assert!(name_and_path(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused_with_the_reason() {
        let why = |m, p| Configuration::new(m, p).unwrap_err().to_string();
        assert!(why(Model::Interrupt, Preempt::Full).contains("no stack to sleep on"));
        for built in Configuration::ALL {
            assert_eq!(
                Configuration::new(built.model, built.preempt).unwrap(),
                built
            );
        }
    }
}
