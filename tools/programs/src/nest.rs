//! `nest [--times N] LEVELS LIMIT PROGRAM [ARGS]`: runs a file as a program, below so many levels of itself.
//!
//! Every level gives the one below it a space of its own, memory for its heap up to LIMIT (bytes, or KiB
//! or MiB with a K or M behind), and nothing else. It sees the child's faults on memory that is not there,
//! its unhandled exceptions and its end; system calls go to the kernel without it, however many levels
//! there are (Ford et al., *Microkernels Meet Recursive Virtual Machines*, OSDI '96).
//!
//! With `--times` the outermost level runs its child so often. The last time must leave in the kernel what
//! the one before it left. The first times do not count, since then this program's own heap still grows; and
//! a time in which it came by a page table of its own is followed by another, which a leak would show in too.

use alloc::format;
use alloc::vec::Vec;

use fluke_abi::boot::ARGS_BYTES;
use fluke_abi::state::Census;
use libfluke::exception::Describe;
use libfluke::parent::{STATUS_EXCEPTION, STATUS_NO_MEMORY};
use libfluke::space::{ChildFile, Error, Export, READ_EXECUTE, own_image};
use libfluke::startup::{self, File};
use libfluke::supervisor::{End, Job, Supervisor};
use libfluke::{println, sys};

/// Bytes of addresses for a child's heap.
const HEAP: u64 = 1 << 30;

/// How often more to run a child that seems to have left something behind.
const MORE: u64 = 3;

/// What to run, and how.
struct Nest<'a> {
    times: u64,
    level: u64,
    limit: u64,
    program: &'a str,
    /// Of the program.
    args: Vec<&'a str>,
}

fn size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(['K', 'M']);
    let unit = match &text[digits.len()..] {
        "" => 0,
        "K" => 10,
        "M" => 20,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_shl(unit)
}

fn arguments<'a>(args: impl Iterator<Item = &'a str>) -> Option<Nest<'a>> {
    let mut args = args.peekable();
    let mut times = 1;
    if args.next_if_eq(&"--times").is_some() {
        times = args.next()?.parse().ok().filter(|times| *times > 0)?;
    }
    let level = args.next()?.parse().ok().filter(|level| *level > 0)?;
    let limit = args.next().and_then(size)?;
    Some(Nest {
        times,
        level,
        limit,
        program: args.next()?,
        args: args.collect(),
    })
}

fn census() -> Census {
    let mut census = Census::default();
    // SAFETY: the pointer is to a local.
    unsafe { sys::machine_census(&raw mut census) };
    census
}

impl Nest<'_> {
    /// Runs the child once; returns its status.
    fn run(&self, program: &File, files: &[ChildFile<'static>]) -> Result<u64, Error> {
        let mut args = Vec::new();
        let (name, image, image_export) = if self.level == 1 {
            let export = files.iter().find(|file| file.address == program.address);
            let export = export.map_or_else(own_image, |file| Ok(file.export))?;
            (self.program, program.bytes(), export)
        } else {
            let (level, limit) = (self.level - 1, self.limit);
            args.extend([format!("{level}"), format!("{limit}"), self.program.into()]);
            ("nest", startup::image(), own_image()?)
        };
        args.extend(self.args.iter().map(|&arg| arg.into()));
        let mut text = format!("{name}\0");
        for arg in &args {
            text += arg;
            text += "\0";
        }
        if text.len() > ARGS_BYTES {
            return Err(Error::BadImage("too many arguments"));
        }
        let mut child = Supervisor::start(&Job {
            image,
            image_export,
            args: text.as_bytes(),
            files,
            heap: HEAP,
            limit: self.limit,
            store: None,
        })?;
        let end = child.serve();
        println!(
            "nest {}: {} faults of {name}, {} KiB of memory",
            self.level,
            child.faults,
            child.memory() >> 10
        );
        child.destroy();
        Ok(match end {
            End::Exited(status) => status,
            End::Raised(raised) => {
                println!("nest {}: {name}: {}", self.level, Describe(&raised));
                STATUS_EXCEPTION
            }
            End::OutOfMemory => {
                println!(
                    "nest {}: {name} wants more than its {} KiB",
                    self.level,
                    self.limit >> 10
                );
                STATUS_NO_MEMORY
            }
        })
    }
}

/// The program.
pub fn main() -> u64 {
    let Some(nest) = arguments(startup::args().skip(1)) else {
        println!(
            "usage: nest [--times N] LEVELS LIMIT PROGRAM [ARGS], PROGRAM being a file's name"
        );
        return crate::USAGE;
    };
    let files = startup::files();
    let Some(program) = files.iter().find(|file| file.name() == nest.program) else {
        println!("nest: there is no file {}", nest.program);
        return crate::USAGE;
    };
    match repeat(&nest, program, files) {
        Ok(status) => status,
        Err(error) => {
            println!("nest {}: cannot start the child: {error}", nest.level);
            crate::FAILED
        }
    }
}

fn repeat(nest: &Nest<'_>, program: &File, files: &'static [File]) -> Result<u64, Error> {
    let mut passed_on = Vec::new();
    for file in files {
        passed_on.push(ChildFile {
            name: file.name(),
            address: file.address,
            size: file.size,
            export: Export::alloc(file.address, file.size.max(1), READ_EXECUTE, None)?,
        });
    }
    let mut status = nest.run(program, &passed_on)?;
    let most = if nest.times > 1 { nest.times + MORE } else { 1 };
    for time in 2..=most {
        let before = census();
        let again = nest.run(program, &passed_on)?;
        let after = census();
        if status != again {
            println!("nest {}: status {status}, then {again}", nest.level);
            return Ok(crate::FAILED);
        }
        let same = before == after;
        if time == most || time >= nest.times && same {
            let verdict = if same { "nothing" } else { "something" };
            println!("nest {}: {verdict} is left behind: {after:?}", nest.level);
            if !same {
                println!("nest {}: before: {before:?}", nest.level);
                status = crate::FAILED;
            }
            break;
        }
    }
    Ok(status)
}
