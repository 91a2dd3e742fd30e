//! A compiler at work: `naga`, the shader compiler of `wgpu`, translates shaders to SPIR-V, with all checks. Sources
//! and what they import it reads from a file server in another space, by messages, and writes its output there.
//!
//! `naga` because it is a compiler that people use, with a front end, a type checker and a code generator, and needs
//! nothing below it but memory.
//!
//! Options: `count[=N]`, `batches=N` ([`crate::meter`]).

use alloc::string::String;
use alloc::vec::Vec;

use libfluke::object::Ref;
use libfluke::rpc::{self, Server};
use libfluke::space::{ChildFile, ChildHeap, Error, Export};
use libfluke::startup::{self, File};
use libfluke::{println, thread};
use naga::back::spv;
use naga::front::wgsl;
use naga::valid::{Capabilities, ValidationFlags, Validator};

use crate::meter::{Meter, Options, cycles};
use crate::neighbour;

/// The files that are compiled; the others are what they import.
const SOURCES: [&str; 2] = ["flatten", "coarse"];

/// `[LOOK_UP, name: 4 words]`: which file, and its bytes; `[0, 0]` if there is none.
const LOOK_UP: u64 = 0x300;
/// `[READ, file, offset]`: the bytes from there, at most a page of them.
const READ: u64 = 0x301;
/// `[WRITE, words...]`: more output.
const WRITE: u64 = 0x302;
/// `[DIGEST, 0]`: the digest of all that was written, and how many words.
const DIGEST: u64 = 0x303;

/// Words of the longest message.
const PAGE_WORDS: usize = 512;
/// Words for a name.
const NAME_WORDS: usize = 4;
/// Bytes of the compiler's stack.
const STACK_BYTES: u64 = 1 << 20;

/// Why the compiler gave up.
enum Trouble {
    Space(Error),
    Source(String),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self::Space(error)
    }
}

impl From<fluke_abi::code::Status> for Trouble {
    fn from(status: fluke_abi::code::Status) -> Self {
        Self::Space(status.into())
    }
}

/// The program.
pub fn main() -> u64 {
    if startup::args().nth(1) == Some("files") {
        return serve();
    }
    let options = match Options::of_program() {
        Ok(options) => options,
        Err(word) => {
            println!("compile: `{word}`; options are count[=N], batches=N");
            return crate::USAGE;
        }
    };
    let compiler = thread::spawn_with_stack(STACK_BYTES, move || {
        let why = match run(options) {
            Ok(()) => return,
            Err(Trouble::Space(error)) => alloc::format!("{error}"),
            Err(Trouble::Source(why)) => why,
        };
        println!("compile: {why}");
        libfluke::exit(crate::FAILED);
    });
    match compiler {
        Ok(compiler) => compiler.join(),
        Err(_) => return crate::FAILED,
    }
    0
}

fn words_of_name(name: &str) -> [u64; NAME_WORDS] {
    let mut bytes = [0; NAME_WORDS * 8];
    for (to, from) in bytes.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    let mut words = [0; NAME_WORDS];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = u64::from_le_bytes(bytes.try_into().unwrap_or_default());
    }
    words
}

/// The file server.
fn serve() -> u64 {
    let Ok(pset) = neighbour::register() else {
        return crate::FAILED;
    };
    let files = startup::files();
    let mut buffer = alloc::vec![0; PAGE_WORDS + 1];
    let mut server = Server::new(pset, &mut buffer, &[]);
    let mut reply = Vec::new();
    let (mut digest, mut written) = (0xcbf2_9ce4_8422_2325_u64, 0);
    loop {
        server.reply_and_wait(&reply);
        reply.clear();
        match *server.words() {
            [LOOK_UP, ref name @ ..] => {
                let named = |file: &File| words_of_name(file.name()) == *name;
                let found = files.iter().position(named);
                let size = found.map_or(0, |file| files[file].size);
                reply.extend([found.map_or(0, |file| file as u64 + 1), size]);
            }
            [READ, file, offset] => {
                let bytes = files[file as usize - 1].bytes();
                let bytes = bytes.get(offset as usize..).unwrap_or_default();
                let page = bytes.chunks(PAGE_WORDS * 8).next().unwrap_or_default();
                reply.extend(page.chunks(8).map(|bytes| {
                    let mut word = [0; 8];
                    word[..bytes.len()].copy_from_slice(bytes);
                    u64::from_le_bytes(word)
                }));
            }
            [WRITE, ref words @ ..] => {
                for word in words {
                    digest = (digest ^ word).wrapping_mul(0x100_0000_01b3);
                    written += 1;
                }
            }
            [DIGEST, ..] => {
                reply.extend([digest, written]);
                (digest, written) = (0xcbf2_9ce4_8422_2325, 0);
            }
            _ => {}
        }
    }
}

/// Reads a file.
fn read(server: &Ref, name: &str) -> Result<String, Trouble> {
    let mut request = [LOOK_UP, 0, 0, 0, 0];
    request[1..].copy_from_slice(&words_of_name(name));
    let mut found = [0; 2];
    rpc::rpc(server, &request, &[], &mut found)?;
    let [file, size] = found;
    if file == 0 {
        return Err(Trouble::Source(alloc::format!("there is no file `{name}`")));
    }
    let mut bytes: Vec<u8> = Vec::with_capacity(size as usize + PAGE_WORDS * 8);
    while (bytes.len() as u64) < size {
        let mut page = [0; PAGE_WORDS];
        let words = rpc::rpc(server, &[READ, file, bytes.len() as u64], &[], &mut page)?;
        if words == 0 {
            break;
        }
        bytes.extend(page[..words].iter().flat_map(|word| word.to_le_bytes()));
    }
    bytes.truncate(size as usize);
    String::from_utf8(bytes).map_err(|_| Trouble::Source(alloc::format!("`{name}` is no text")))
}

/// Reads a source, with what it imports in the place of the imports.
fn preprocess(server: &Ref, name: &str) -> Result<String, Trouble> {
    let source = read(server, name)?;
    let mut text = String::with_capacity(2 * source.len());
    for line in source.lines() {
        match line.strip_prefix("#import ") {
            Some(import) => text.push_str(&preprocess(server, import.trim())?),
            None => text.push_str(line),
        }
        text.push('\n');
    }
    Ok(text)
}

/// Compiles a source; returns the words of the output.
fn compile(server: &Ref, name: &str) -> Result<u64, Trouble> {
    let text = preprocess(server, name)?;
    let wrong = |what: String| Trouble::Source(alloc::format!("`{name}`: {what}"));
    let module = wgsl::parse_str(&text).map_err(|error| wrong(error.emit_to_string(&text)))?;
    let mut validator = Validator::new(ValidationFlags::all(), Capabilities::all());
    let info = validator
        .validate(&module)
        .map_err(|error| wrong(error.emit_to_string(&text)))?;
    let output = spv::write_vec(&module, &info, &spv::Options::default(), None)
        .map_err(|error| wrong(alloc::format!("{error}")))?;
    for page in output.chunks(PAGE_WORDS) {
        let message: Vec<u64> = core::iter::once(WRITE)
            .chain(page.iter().map(|&word| u64::from(word)))
            .collect();
        rpc::rpc(server, &message, &[], &mut [0])?;
    }
    Ok(output.len() as u64)
}

fn run(options: Options) -> Result<(), Trouble> {
    let mut meter = Meter::new(options);
    meter.measure("nothing", 1, || ());
    let mut passed = Vec::new();
    for file in startup::files() {
        passed.push(ChildFile {
            name: file.name(),
            address: file.address,
            size: file.size,
            export: Export::alloc(
                file.address,
                file.size.max(1),
                fluke_abi::state::Prot::READ,
                None,
            )?,
        });
    }
    let heap = ChildHeap::Own(1 << 17);
    let server = neighbour::start_with(b"compile\0files\0", heap, &[], &passed)?;
    let mut samples = Vec::new();
    let mut digests = [0; 2];
    for pass in 0..=options.batches {
        let counted = options.count && pass > 0;
        if counted {
            meter.tell(fluke_abi::bench::News::Begin, 1, "compilation");
        }
        let start = cycles();
        let mut words = 0;
        for name in SOURCES {
            words += compile(server, name)?;
        }
        let took = cycles() - start;
        if counted {
            meter.tell(fluke_abi::bench::News::End, 1, "compilation");
        }
        let mut digest = [0; 2];
        rpc::rpc(server, &[DIGEST, 0], &[], &mut digest)?;
        if digest[1] != words || pass > 0 && digest != digests {
            let why = alloc::format!("{words} words of output, and the server has {digest:x?}");
            return Err(Trouble::Source(why));
        }
        digests = digest;
        if pass > 0 {
            samples.push(took);
        }
    }
    if !options.count {
        meter.report("compilation", 1, &samples);
        println!("figure words {}", digests[1]);
        println!("figure digest {}", digests[0]);
    }
    meter.done();
    Ok(())
}
