//! Stopping a child, and taking it down into a file.
//!
//! 1. Its memory is withheld: what runs of it faults, and what is in the kernel can name no object any more.
//! 2. Its threads are stopped, until a whole pass over all of them finds none that had not been.
//! 3. Every object's state is taken. What its links lead to is found by hash and comparison: an object of
//!    the child's, something outside that the child is known to have, or something outside that is cut off.
//! 4. Memory that is not zero goes behind it.
//!
//! All by calls that any program can make on memory that is its own.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec;
use alloc::vec::Vec;

use fluke_abi::code::Status;
use fluke_abi::layout::PAGE_SIZE;
use fluke_abi::state::ThreadFlags;
use libfluke::object::Ref;
use libfluke::space::{READ_WRITE, own_heap};
use libfluke::startup;

use crate::environment::{Environment, Memory, Object, Page, pages_at, set_stopped};
use crate::format::{
    Catalogue, Checksum, Chunk, External, Header, Link, Part, Pickle, Place, Run, View, pages,
};
use crate::store::{self, Store};

/// An object of the child's, and its place in the child's memory.
#[derive(Clone, Copy, Debug)]
struct Found {
    object: Object,
    place: Place,
    /// A thread that was not stopped.
    runs: bool,
}

/// A child that is stopped.
pub struct Stopped {
    found: Vec<Found>,
    /// Nanoseconds since boot.
    clock: u64,
}

/// What a checkpoint amounts to.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Objects.
    pub objects: usize,
    /// Links to the outside that have no name there, and were cut.
    pub cut: usize,
    /// Bytes of the file.
    pub bytes: u64,
}

impl Environment {
    /// Stops everything.
    pub fn stop(&mut self) -> Result<Stopped, Status> {
        own_heap()?.withhold(self.supervisor.own());
        let memory = self.memory();
        let mut running = BTreeSet::new();
        loop {
            let mut found = Vec::new();
            let mut all_stopped = true;
            for Memory {
                place,
                address,
                size,
            } in &memory
            {
                for (kind, at) in own_heap()?.objects(*address, *size) {
                    let Some(object) = Object::new(kind, at) else {
                        continue;
                    };
                    let mut runs = false;
                    if let Some(thread) = object.as_thread() {
                        let flags = ThreadFlags::from_bits_retain(thread.state(None).flags);
                        if !flags.contains(ThreadFlags::STOPPED) {
                            running.insert(at);
                            all_stopped = false;
                        }
                        runs = running.contains(&at);
                    }
                    let offset = place.offset + (at - address);
                    let place = Place { offset, ..*place };
                    found.push(Found {
                        object,
                        place,
                        runs,
                    });
                }
            }
            if all_stopped {
                let clock = startup::now();
                return Ok(Stopped { found, clock });
            }
        }
    }

    /// Lets everything go on that was stopped.
    pub fn go_on(&mut self, stopped: &Stopped) -> Result<(), Status> {
        own_heap()?.give_back(READ_WRITE);
        for found in stopped.found.iter().filter(|found| found.runs) {
            if let Some(thread) = found.object.as_thread() {
                thread.go_on();
            }
        }
        Ok(())
    }

    /// Writes everything to the host's file.
    pub fn write(&mut self, stopped: &Stopped, store: &Store) -> Result<Size, store::Error> {
        let (objects, cut) = self.pickle(stopped).map_err(|_| store::Error::NoMemory)?;
        let mut catalogue = self.catalogue();
        catalogue.objects = objects;
        let mut encoded = postcard::to_allocvec(&catalogue).map_err(|_| store::Error::NoMemory)?;
        let catalogue_size = encoded.len() as u64;
        encoded.resize((pages(catalogue_size) * PAGE_SIZE) as usize, 0);

        let mut file = Writer {
            store,
            at: PAGE_SIZE,
            checksum: Checksum::default(),
        };
        file.write(&encoded)?;
        for source in &self.sources {
            // SAFETY: sources are mapped for good, and nobody writes to them.
            file.write(unsafe { pages_at(source.address, source.size) }.as_flattened())?;
        }
        let memory = self.memory();
        for run in &catalogue.runs {
            file.write(contents(&memory, run).as_flattened())?;
        }
        let size = file.at;
        let header = Header::new(size, catalogue_size, stopped.clock, file.checksum.value());
        store.write(0, &header.page())?;
        store.commit(size)?;
        Ok(Size {
            objects: catalogue.objects.len(),
            cut,
            bytes: size,
        })
    }

    /// Memory, and the space that the child began with.
    fn catalogue(&mut self) -> Catalogue {
        let memory = self.memory();
        let (_, window) = self.supervisor.heap();
        let given: Vec<_> = self.supervisor.child().memory().to_vec();
        let place_of = |from: u64| {
            let part = |start: u64, size: u64, part| {
                (start..start + size).contains(&from).then(|| Place {
                    part,
                    offset: from - start,
                })
            };
            let mut given = (0..).zip(&given);
            let mut sources = (0..).zip(&self.sources);
            given
                .find_map(|(n, (start, size))| part(*start, *size, Part::Given(n)))
                .or_else(|| sources.find_map(|(n, s)| part(s.address, s.size, Part::Source(n))))
                .unwrap_or(Place {
                    part: Part::Heap,
                    offset: from - window,
                })
        };
        let views = self.supervisor.child().views().iter().map(|view| View {
            from: place_of(view.from),
            size: view.size,
            prot: view.prot.bits(),
            at: view.at,
        });
        let views: Vec<_> = views.collect();
        let heap = views.iter().filter(|view| view.from.part == Part::Heap);
        let heap = heap.map(|view| view.size).sum();
        let mut chunks: Vec<_> = self
            .supervisor
            .chunks()
            .iter()
            .map(|chunk| Chunk {
                start: chunk.start,
                size: chunk.size,
            })
            .collect();
        chunks.sort_by_key(|chunk| chunk.start);
        Catalogue {
            given: given.iter().map(|(_, size)| *size).collect(),
            sources: self.sources.iter().map(|source| source.size).collect(),
            heap,
            heap_left: self.supervisor.left(),
            chunks,
            views,
            objects: Vec::new(),
            runs: memory.iter().flat_map(runs).collect(),
            requests: self.requests,
        }
    }

    /// The state of every object, and how many links were cut.
    fn pickle(&mut self, stopped: &Stopped) -> Result<(Vec<Pickle>, usize), Status> {
        let mut naming = Naming::new(self, &stopped.found)?;
        let mut pickles = Vec::new();
        for Found {
            object,
            place,
            runs,
        } in &stopped.found
        {
            let mut state = vec![0; object.kind.state];
            let links: Vec<_> = naming.links[..object.kind.links.len()].to_vec();
            object.get(&mut state, &links);
            if *runs {
                set_stopped(&mut state, false);
            }
            let links = links.into_iter().map(|link| naming.name(link)).collect();
            pickles.push(Pickle {
                kind: object.kind.kind as u8,
                place: *place,
                state,
                links,
            });
        }
        Ok((pickles, naming.unmake()))
    }
}

/// Finds what links lead to.
struct Naming<'a> {
    found: &'a [Found],
    /// Objects by hash. Different objects may have the same.
    by_hash: BTreeMap<u64, Vec<u32>>,
    externals: [(External, &'static Ref); External::ALL.len()],
    /// As many references as an object can have links.
    links: [&'static Ref; 4],
    /// A link to what is compared.
    probe: &'static Ref,
    cut: usize,
}

impl<'a> Naming<'a> {
    fn new(environment: &mut Environment, found: &'a [Found]) -> Result<Self, Status> {
        let probe = Ref::alloc()?;
        let mut by_hash: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for (number, found) in (0..).zip(found) {
            if found.object.point(probe) {
                by_hash.entry(probe.hash()).or_default().push(number);
            }
        }
        Ok(Self {
            found,
            by_hash,
            externals: External::ALL.map(|external| (external, environment.external(external))),
            links: [Ref::alloc()?, Ref::alloc()?, Ref::alloc()?, Ref::alloc()?],
            probe,
            cut: 0,
        })
    }

    /// What a reference links to.
    fn name(&mut self, link: &Ref) -> Link {
        if !link.is_live() {
            return Link::Null;
        }
        for &number in self.by_hash.get(&link.hash()).into_iter().flatten() {
            self.found[number as usize].object.point(self.probe);
            if link.same(self.probe) {
                return Link::Object(number);
            }
        }
        for (external, reference) in self.externals {
            if link.same(reference) {
                return Link::External(external);
            }
        }
        self.cut += 1;
        Link::Null
    }

    /// Unmakes the references; returns how many links were cut.
    fn unmake(self) -> usize {
        self.links
            .into_iter()
            .chain([self.probe])
            .for_each(Ref::destroy);
        self.cut
    }
}

/// The pages of a run of memory that are not zero.
fn runs(memory: &Memory) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    // SAFETY: the memory is the checkpointer's, and of those who it was given to nobody runs.
    let all = unsafe { pages_at(memory.address, memory.size) };
    let at = |page: usize| memory.place.offset + page as u64 * PAGE_SIZE;
    for (number, page) in all.iter().enumerate() {
        if is_zero(page) {
            continue;
        }
        match runs.last_mut() {
            Some(last) if last.from.offset + last.pages * PAGE_SIZE == at(number) => {
                last.pages += 1;
            }
            _ => runs.push(Run {
                from: Place {
                    part: memory.place.part,
                    offset: at(number),
                },
                pages: 1,
            }),
        }
    }
    runs
}

fn is_zero(page: &Page) -> bool {
    // SAFETY: any bytes are words.
    let (_, words, _) = unsafe { page.align_to::<u64>() };
    words.iter().all(|&word| word == 0)
}

/// The contents of a run, which lies in one run of memory.
fn contents(memory: &[Memory], run: &Run) -> &'static [Page] {
    let within = |memory: &&Memory| {
        memory.place.part == run.from.part
            && (memory.place.offset..memory.place.offset + memory.size).contains(&run.from.offset)
    };
    memory.iter().find(within).map_or(&[], |memory| {
        let address = memory.address + run.from.offset - memory.place.offset;
        // SAFETY: as in `runs`, which found the run there.
        unsafe { pages_at(address, run.pages * PAGE_SIZE) }
    })
}

/// Writes one thing behind the other.
struct Writer<'a> {
    store: &'a Store,
    /// Offset in the file.
    at: u64,
    checksum: Checksum,
}

impl Writer<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), store::Error> {
        self.store.write(self.at, bytes)?;
        self.checksum.update(bytes);
        self.at += bytes.len() as u64;
        Ok(())
    }
}
