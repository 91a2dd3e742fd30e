//! `checkpoint run [--after MS] PROGRAM [ARGS]`: runs a file as a program that can be written to the store;
//! it sees all other files. `checkpoint restore [--after MS] FILE`: lets the program in such a file go on.
//!
//! A checkpoint is taken when the program asks for it ([`libfluke::parent::checkpoint`]), or after so many
//! milliseconds. It always proves itself: the program is unmade, and what goes on is what was read back from
//! the file.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::iter::Peekable;

use fluke_abi::boot::ARGS_BYTES;
use fluke_abi::layout::PAGE_SIZE;
use libfluke::exception::Describe;
use libfluke::object::Ref;
use libfluke::parent::{STATUS_EXCEPTION, STATUS_NO_MEMORY};
use libfluke::space::{ChildFile, Error, Export, READ_EXECUTE, READ_WRITE, own_heap};
use libfluke::startup::{self, File};
use libfluke::supervisor::{End, Event, Job};
use libfluke::{println, rpc, thread};

use crate::environment::{Environment, Source};
use crate::format::{Checkpoint, Refusal};
use crate::store::{self, Store};

/// Bytes of addresses for the program's heap.
const HEAP: u64 = 1 << 30;
/// Status when there is nothing to go on with.
const FAILED: u64 = 1;
/// Status when called in a wrong way.
const USAGE: u64 = 2;

/// Why the program cannot be started, or cannot go on.
enum Trouble {
    /// It was called in a wrong way, or with no such file.
    Usage(String),
    /// A space cannot be made.
    Space(Error),
    /// The store does not give back what it was given.
    Store(store::Error),
    /// A file that is none.
    File(Refusal),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self::Space(error)
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(what) => f.write_str(what),
            Self::Space(error) => write!(f, "cannot make the program: {error}"),
            Self::Store(error) => write!(f, "cannot read the file back: {error}"),
            Self::File(refusal) => write!(f, "{refusal}"),
        }
    }
}

impl Trouble {
    const fn status(&self) -> u64 {
        match self {
            Self::Usage(_) | Self::File(_) => USAGE,
            Self::Space(Error::NoMemory) => STATUS_NO_MEMORY,
            Self::Space(Error::BadImage(_)) => USAGE,
            Self::Store(_) => FAILED,
        }
    }
}

/// What is to be served.
struct Started {
    environment: Environment,
    /// The program's name.
    name: String,
    /// When a checkpoint is to be taken, milliseconds from now.
    after: Option<u64>,
}

/// The program.
pub fn main() -> u64 {
    let mut args = startup::args().skip(1);
    let started = match args.next() {
        Some("run") => run(args),
        Some("restore") => restore(args),
        _ => Err(Trouble::Usage(
            "usage: checkpoint run [--after MS] PROGRAM [ARGS] | checkpoint restore [--after MS] FILE"
                .into(),
        )),
    };
    let ended = started.and_then(|started| started.serve());
    ended.unwrap_or_else(|trouble| {
        println!("checkpoint: {trouble}");
        trouble.status()
    })
}

fn find(name: Option<&str>) -> Result<&'static File, Trouble> {
    let name = name.ok_or_else(|| Trouble::Usage("give the name of a file".into()))?;
    let file = startup::files().iter().find(|file| file.name() == name);
    file.ok_or_else(|| Trouble::Usage(format!("there is no file {name}")))
}

fn export(file: &File) -> Result<&'static Export, Error> {
    Ok(Export::alloc(
        file.address,
        file.size.max(1),
        READ_EXECUTE,
        None,
    )?)
}

/// Starts a program.
fn run(args: impl Iterator<Item = &'static str>) -> Result<Started, Trouble> {
    let mut args = args.peekable();
    let after = after(&mut args)?;
    let program = find(args.next())?;
    let mut text = format!("{}\0", program.name());
    for arg in args {
        text += arg;
        text += "\0";
    }
    if text.len() > ARGS_BYTES {
        return Err(Trouble::Usage("too many arguments".into()));
    }
    let (mut files, mut sources) = (Vec::new(), Vec::new());
    for file in startup::files() {
        let export = export(file)?;
        sources.push(Source {
            address: file.address,
            size: file.size.next_multiple_of(PAGE_SIZE),
            export,
        });
        files.push(ChildFile {
            name: file.name(),
            address: file.address,
            size: file.size,
            export,
        });
    }
    let is_program = |file: &ChildFile<'_>| file.address == program.address;
    let image = files.iter().position(is_program);
    let image_export = image.map(|at| files.remove(at).export);
    let environment = Environment::start(
        &Job {
            image: program.bytes(),
            image_export: image_export.ok_or(Error::NoMemory)?,
            args: text.as_bytes(),
            files: &files,
            heap: HEAP,
            limit: u64::MAX,
            store: None,
        },
        sources,
    )?;
    Ok(Started {
        environment,
        name: program.name().into(),
        after,
    })
}

/// Milliseconds after which a checkpoint is to be taken.
fn after(args: &mut Peekable<impl Iterator<Item = &'static str>>) -> Result<Option<u64>, Trouble> {
    if args.next_if_eq(&"--after").is_none() {
        return Ok(None);
    }
    let ms = args.next().and_then(|ms| ms.parse().ok());
    ms.map(Some)
        .ok_or_else(|| Trouble::Usage("--after takes milliseconds".into()))
}

/// Lets the program in a file go on.
fn restore(args: impl Iterator<Item = &'static str>) -> Result<Started, Trouble> {
    let mut args = args.peekable();
    let after = after(&mut args)?;
    let file = find(args.next())?;
    let checkpoint = Checkpoint::read(file.bytes()).map_err(Trouble::File)?;
    let export = export(file)?;
    let sources = (0..checkpoint.catalogue.sources.len()).map(|number| {
        let contents = checkpoint.source(number);
        Source {
            address: contents.as_ptr() as u64,
            size: contents.len() as u64,
            export,
        }
    });
    let environment = Environment::restore(&checkpoint, sources.collect())?;
    println!(
        "checkpoint: {} objects restored",
        checkpoint.catalogue.objects.len()
    );
    Ok(Started {
        environment,
        name: "the program".into(),
        after,
    })
}

/// Has the supervisor told after so many milliseconds, by a message to the port behind a link.
fn set_alarm(link: &'static Ref, after: u64) -> Result<(), Error> {
    thread::spawn(move || {
        thread::sleep(after.saturating_mul(1_000_000));
        // A supervisor that has gone need not know.
        let _ = rpc::send(link, &[]);
    })?;
    Ok(())
}

impl Started {
    /// Serves the program until it ends; returns its status.
    fn serve(self) -> Result<u64, Trouble> {
        let Self {
            mut environment,
            name,
            after,
        } = self;
        let alarm = Ref::alloc().map_err(Error::from)?;
        alarm.copy_from(environment.supervisor.own());
        if let Some(after) = after {
            set_alarm(alarm, after)?;
        }
        let mut answer: &[u64] = &[];
        loop {
            let request = match environment.supervisor.next(answer) {
                Event::Ended(End::Exited(status)) => return Ok(status),
                Event::Ended(End::Raised(raised)) => {
                    println!("checkpoint: {name}: {}", Describe(&raised));
                    return Ok(STATUS_EXCEPTION);
                }
                Event::Ended(End::OutOfMemory) => {
                    println!("checkpoint: {name} wants more memory than there is");
                    return Ok(STATUS_NO_MEMORY);
                }
                // It has been brought back, and asks again.
                Event::Checkpoint(number) if number <= environment.requests => {
                    answer = &[1];
                    continue;
                }
                Event::Checkpoint(number) => number,
                Event::Message => environment.requests,
            };
            (environment, answer) = checkpoint(environment, request)?;
            alarm.copy_from(environment.supervisor.own());
        }
    }
}

/// Writes the program to the store, and brings it back from there. Returns what goes on, and what it is
/// answered if it is what there was.
fn checkpoint(
    mut environment: Environment,
    request: u64,
) -> Result<(Environment, &'static [u64]), Trouble> {
    let store = Store::new(&startup::startup().store);
    let stopped = environment.stop().map_err(Error::from)?;
    let requests = core::mem::replace(&mut environment.requests, request);
    let size = match environment.write(&stopped, &store) {
        Ok(size) => size,
        Err(error) => {
            println!("checkpoint: not taken: {error}");
            environment.requests = requests;
            environment.go_on(&stopped).map_err(Error::from)?;
            return Ok((environment, &[0]));
        }
    };
    println!(
        "checkpoint: {} objects, {} links cut, {} KiB",
        size.objects,
        size.cut,
        size.bytes >> 10
    );
    let sources = core::mem::take(&mut environment.sources);
    own_heap().map_err(Error::from)?.give_back(READ_WRITE);
    environment.supervisor.destroy();
    let file = store.read(size.bytes).map_err(Trouble::Store)?;
    let checkpoint = Checkpoint::read(&file).map_err(Trouble::File)?;
    Ok((Environment::restore(&checkpoint, sources)?, &[]))
}
