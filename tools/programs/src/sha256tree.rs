//! Hashes the files it is given, with worker spaces on all CPUs.
//!
//! The workers are copies of this program in spaces of their own, with the files mapped
//! read-only. They ask the master for work by reliable RPC, and hand in the result with the next
//! request. One job of a file is its SHA-256, which is sequential; the others are the digests of
//! its chunks, whose digest in turn is the root of the tree.
//!
//! Usage: `sha256tree [--expect HEX]...`: one expectation for each file, in order.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use fluke_abi::ipc::ExceptionMessage;
use fluke_abi::state::Prot;
use libfluke::exception::{self, Describe};
use libfluke::object::{Port, Pset, Ref};
use libfluke::parent::{EXIT, STATUS_EXCEPTION, STATUS_NO_MEMORY};
use libfluke::rpc::{self, Server};
use libfluke::space::{Child, ChildFile, Error, Export, Spec};
use libfluke::startup::{self, File};
use libfluke::{exit, println};
use sha2::{Digest, Sha256};

/// Bytes of a chunk.
const CHUNK: u64 = 1 << 20;
/// Most workers: beyond, they would only wait for each other's memory.
const WORKERS_MAX: usize = 64;

/// `[NEXT, job + 1 or 0, digest: 4 words]`: here is what you wanted; what next?
const NEXT: u64 = 0x100;
/// The answer `[job + 1, file, offset, length]`, or `[0, 0, 0, 0]` when there is nothing to do.
const ANSWER_WORDS: usize = 4;
/// Words of a request.
const REQUEST_WORDS: usize = 6;

type Hash = [u8; 32];

fn sha256(bytes: &[u8]) -> Hash {
    Sha256::digest(bytes).into()
}

fn hex(hash: &Hash) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Part of a file to hash.
#[derive(Clone, Copy)]
struct Job {
    file: usize,
    offset: u64,
    length: u64,
    /// The whole file, rather than a chunk.
    whole: bool,
}

/// The program.
pub fn main() -> u64 {
    if startup::args().nth(1) == Some("worker") {
        return worker();
    }
    let mut expected = Vec::new();
    let mut args = startup::args().skip(1);
    while let Some(arg) = args.next() {
        match (arg, args.next()) {
            ("--expect", Some(hash)) => expected.push(hash),
            _ => {
                println!("usage: sha256tree [--expect HEX]..., with at least one --file");
                return crate::USAGE;
            }
        }
    }
    let files = startup::files();
    if files.is_empty() || expected.len() > files.len() {
        println!(
            "sha256tree: {} files, {} expected digests",
            files.len(),
            expected.len()
        );
        return crate::USAGE;
    }
    // The known answer of FIPS 180-2, appendix B.1.
    let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    if hex(&sha256(b"abc")) != abc {
        println!("sha256tree: the hash function is wrong");
        return crate::FAILED;
    }
    match run(files) {
        Ok((jobs, hashes)) => report(files, &expected, &jobs, &hashes),
        Err(error) => {
            println!("sha256tree: {error}");
            STATUS_NO_MEMORY
        }
    }
}

/// Makes the workers, and serves them until every job is done.
fn run(files: &'static [File]) -> Result<(Vec<Job>, Vec<Hash>), Error> {
    let jobs = jobs(files);
    let workers = startup::cpus().min(WORKERS_MAX).min(jobs.len());
    let pset = Pset::alloc()?;
    let parent = Ref::to(Port::in_set(pset, 0)?)?;
    let mut passed = Vec::new();
    for file in files {
        passed.push(ChildFile {
            name: file.name(),
            address: file.address,
            size: file.size,
            export: Export::alloc(file.address, file.size.max(1), Prot::READ, None)?,
        });
    }
    let spec = Spec {
        files: &passed,
        ..Spec::own_program(b"sha256tree\0worker\0", parent)?
    };
    let mut children = Vec::new();
    for _ in 0..workers {
        let child = Child::new(&spec)?;
        child.start();
        children.push(child);
    }
    println!(
        "sha256tree: {} jobs for {workers} worker spaces",
        jobs.len()
    );

    let mut hashes = alloc::vec![[0; 32]; jobs.len()];
    let (mut given, mut taken) = (0, 0);
    let mut buffer = [0; ExceptionMessage::WORDS + 1];
    let mut server = Server::new(pset, &mut buffer, &[]);
    let mut reply = [0; ANSWER_WORDS];
    while taken < jobs.len() {
        server.reply_and_wait(&reply);
        reply = [0; ANSWER_WORDS];
        match *server.words() {
            [NEXT, job, ref digest @ ..] if digest.len() == 4 => {
                if let Some(hash) = (job as usize)
                    .checked_sub(1)
                    .and_then(|i| hashes.get_mut(i))
                {
                    for (bytes, word) in hash.chunks_exact_mut(8).zip(digest) {
                        bytes.copy_from_slice(&word.to_le_bytes());
                    }
                    taken += 1;
                }
                if let Some(job) = jobs.get(given) {
                    given += 1;
                    reply = [given as u64, job.file as u64, job.offset, job.length];
                }
            }
            [EXIT, status, ..] if status != 0 => {
                println!("sha256tree: a worker ended with status {status}");
                exit(status);
            }
            ref words => {
                if let Some(raised) = exception::parse(words) {
                    println!("sha256tree: worker: {}", Describe(&raised));
                    exit(STATUS_EXCEPTION);
                }
            }
        }
    }
    Ok((jobs, hashes))
}

/// Whole files first: they take longest.
fn jobs(files: &[File]) -> Vec<Job> {
    let whole = files.iter().enumerate().map(|(file, f)| Job {
        file,
        offset: 0,
        length: f.size,
        whole: true,
    });
    let chunks = files.iter().enumerate().flat_map(|(file, f)| {
        (0..f.size.div_ceil(CHUNK)).map(move |i| {
            let offset = i * CHUNK;
            Job {
                file,
                offset,
                length: CHUNK.min(f.size - offset),
                whole: false,
            }
        })
    });
    whole.chain(chunks).collect()
}

/// Prints the digests, and compares them with those expected.
fn report(files: &[File], expected: &[&str], jobs: &[Job], hashes: &[Hash]) -> u64 {
    let mut status = 0;
    for (i, file) in files.iter().enumerate() {
        let of_file = || {
            jobs.iter()
                .zip(hashes)
                .filter(move |(job, _)| job.file == i)
        };
        let chunks: Vec<&Hash> = of_file()
            .filter(|(job, _)| !job.whole)
            .map(|(_, hash)| hash)
            .collect();
        let mut tree = Sha256::new();
        chunks.iter().for_each(|hash| tree.update(hash));
        println!(
            "tree {}  {} ({} chunks)",
            hex(&tree.finalize().into()),
            file.name(),
            chunks.len()
        );
        let Some(whole) = of_file().find(|(job, _)| job.whole).map(|(_, hash)| hash) else {
            continue;
        };
        // A file of one chunk is hashed twice, by different workers if there are two.
        if let [chunk] = chunks[..]
            && chunk != whole
        {
            println!("sha256tree: {}: two workers disagree", file.name());
            status = crate::FAILED;
        }
        if let Some(expected) = expected.get(i)
            && !expected.eq_ignore_ascii_case(&hex(whole))
        {
            println!("sha256tree: {}: expected {expected}", file.name());
            status = crate::FAILED;
        }
        println!("{}  {}", hex(whole), file.name());
    }
    status
}

/// What a worker space does.
fn worker() -> u64 {
    let parent = &startup::startup().parent;
    let mut request = [0; REQUEST_WORDS];
    request[0] = NEXT;
    loop {
        let mut reply = [0; ANSWER_WORDS];
        let answered = rpc::rpc(parent, &request, &[], &mut reply);
        let [job, file, offset, length] = reply.map(|word| word as usize);
        if answered != Ok(ANSWER_WORDS) || job == 0 {
            return u64::from(answered != Ok(ANSWER_WORDS));
        }
        let hash = sha256(&startup::files()[file].bytes()[offset..offset + length]);
        request[1] = job as u64;
        for (word, bytes) in request[2..].iter_mut().zip(hash.chunks_exact(8)) {
            *word = bytes
                .iter()
                .rev()
                .fold(0, |word, &byte| word << 8 | u64::from(byte));
        }
    }
}
