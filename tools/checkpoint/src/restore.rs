//! Making a child again from a file.
//!
//! 1. Memory, with its contents, where the child had it.
//! 2. Every object at its place, with its hash.
//! 3. Every object's state and links; threads among them, but stopped.
//! 4. The threads that ran go on, each from its registers: nothing else was lost.

use alloc::vec::Vec;

use fluke_abi::layout::PAGE_SIZE;
use fluke_abi::object::Type;
use fluke_abi::state::{Prot, ThreadFlags, ThreadState};
use libfluke::object::Ref;
use libfluke::space::{Error, own_heap};
use libfluke::supervisor::Supervisor;
use zerocopy::FromBytes;

use crate::environment::{Environment, Memory, Object, Source, set_stopped};
use crate::format::{Catalogue, Checkpoint, Link, Part, Pickle, Place};

/// A file whose objects are not what its catalogue says.
const BAD_OBJECT: Error = Error::BadImage("the checkpoint has an object without memory");

impl Environment {
    /// Makes everything again, and lets it go on. Its sources are where `sources` says.
    pub fn restore(checkpoint: &Checkpoint<'_>, sources: Vec<Source>) -> Result<Self, Error> {
        let catalogue = &checkpoint.catalogue;
        let mut environment = Self {
            supervisor: Supervisor::new(catalogue.heap, catalogue.heap_left)?,
            sources,
            requests: catalogue.requests,
        };
        match environment.build(checkpoint) {
            Ok(()) => Ok(environment),
            Err(error) => {
                environment.supervisor.destroy();
                Err(error)
            }
        }
    }

    fn build(&mut self, checkpoint: &Checkpoint<'_>) -> Result<(), Error> {
        let catalogue = &checkpoint.catalogue;
        self.provide(catalogue)?;
        self.map(catalogue)?;
        let memory = self.memory();
        for (run, contents) in checkpoint.runs() {
            for (number, page) in (0..).zip(contents.chunks_exact(PAGE_SIZE as usize)) {
                let offset = run.from.offset + number * PAGE_SIZE;
                let to = address_of(&memory, Place { offset, ..run.from }).ok_or(BAD_OBJECT)?;
                // SAFETY: the page is the checkpointer's own, and nobody else has seen it yet.
                unsafe { (to as *mut u8).copy_from_nonoverlapping(page.as_ptr(), page.len()) };
            }
        }
        let mut objects = Vec::new();
        for pickle in &catalogue.objects {
            let kind = Type::from_number(pickle.kind.into());
            let at = address_of(&memory, pickle.place);
            let object = kind.zip(at).and_then(|(kind, at)| Object::new(kind, at));
            let object = object.ok_or(BAD_OBJECT)?;
            object.create(hash(pickle))?;
            objects.push(object);
        }
        self.set_states(&catalogue.objects, &objects)?;
        for (pickle, object) in catalogue.objects.iter().zip(&objects) {
            if runs(pickle) {
                let thread = object.as_thread();
                let state = ThreadState::read_from_bytes(&pickle.state).ok();
                if let Some((thread, state)) = thread.zip(state) {
                    // SAFETY: the state is the thread's own.
                    unsafe { thread.set_state(Some(&state), None, None, None) };
                }
            }
        }
        Ok(())
    }

    /// Gets the memory.
    fn provide(&mut self, catalogue: &Catalogue) -> Result<(), Error> {
        for size in &catalogue.given {
            self.supervisor.child().provide(*size)?;
        }
        for chunk in &catalogue.chunks {
            self.supervisor.place(chunk.start, chunk.size)?;
        }
        Ok(())
    }

    /// Makes the space that the child began with.
    fn map(&mut self, catalogue: &Catalogue) -> Result<(), Error> {
        let (heap, window) = self.supervisor.heap();
        for view in &catalogue.views {
            let offset = view.from.offset;
            let (export, from) = match view.from.part {
                Part::Given(number) => {
                    let (start, _) = self.supervisor.child().memory()[number as usize];
                    (own_heap()?, start + offset)
                }
                Part::Heap => (heap, window + offset),
                Part::Source(number) => {
                    let source = &self.sources[number as usize];
                    (source.export, source.address + offset)
                }
            };
            let prot = Prot::from_bits_truncate(view.prot);
            self.supervisor
                .child()
                .map(export, from, view.size, prot, view.at)?;
        }
        Ok(())
    }

    fn set_states(&mut self, pickles: &[Pickle], objects: &[Object]) -> Result<(), Error> {
        let links = [Ref::alloc()?, Ref::alloc()?, Ref::alloc()?, Ref::alloc()?];
        let null = Ref::alloc()?;
        for (pickle, object) in pickles.iter().zip(objects) {
            for (link, reference) in pickle.links.iter().zip(links) {
                match *link {
                    Link::Null => reference.copy_from(null),
                    Link::Object(number) => {
                        objects[number as usize].point(reference);
                    }
                    Link::External(external) => reference.copy_from(self.external(external)),
                }
            }
            let mut state = pickle.state.clone();
            if runs(pickle) {
                set_stopped(&mut state, true);
            }
            object.set(&state, &links[..pickle.links.len()]);
        }
        links.into_iter().chain([null]).for_each(Ref::destroy);
        Ok(())
    }
}

/// Where a place is in the checkpointer's space.
fn address_of(memory: &[Memory], place: Place) -> Option<u64> {
    memory.iter().find_map(|memory| {
        let offset = place.offset.checked_sub(memory.place.offset)?;
        let within = memory.place.part == place.part && offset < memory.size;
        within.then(|| memory.address + offset)
    })
}

/// The hash of an object, with which its state begins.
fn hash(pickle: &Pickle) -> u64 {
    pickle
        .state
        .first_chunk()
        .map_or(0, |hash| u64::from_le_bytes(*hash))
}

/// Whether it is a thread that ran.
fn runs(pickle: &Pickle) -> bool {
    let state = ThreadState::read_from_bytes(&pickle.state).ok();
    pickle.kind == Type::Thread as u8
        && state.is_some_and(|state| state.flags & ThreadFlags::STOPPED.bits() == 0)
}
