//! The kernel's state in its own terms: arenas, the names of objects, queues.
//!
//! What is known here are names and customs (a slot is alive while its name has an odd generation); where
//! anything lies, [`super::types`] knows. A machine can be paused between any two instructions, and its
//! kernel may be wrong: walks are bounded, and what does not fit is reported beside what does.

use std::collections::BTreeMap;
use std::fmt;

use fluke_abi::object::OBJECT_SIZE;
use serde::Serialize;

use super::types::{Kind, short};
use super::value::{Guest, Value};
use super::{Error, Result};

/// Where the kernel keeps everything.
const LOCKED: &str = "fluke_kernel::lock::LOCKED";
/// Roles in connections.
const SIDE: &str = "fluke_kernel::thread::Side";
/// More objects than any arena has room for.
const CAPACITY_MAX: u64 = 1 << 21;

/// Names an object: its type and its place in the arena of that type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Name {
    /// Type, such as `thread`.
    pub kind: String,
    /// Place in the arena.
    pub index: u64,
    /// Whether the object is alive; a link to it may be older.
    pub alive: bool,
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, index, alive } = self;
        let dead = if *alive { "" } else { " (destroyed)" };
        write!(f, "{kind} {index}{dead}")
    }
}

/// All objects of one type.
#[derive(Clone)]
pub struct Arena<'g> {
    /// Name of the objects' type.
    ty: String,
    first: Value<'g>,
    /// Objects that there is room for.
    pub capacity: u64,
    /// Slots that were ever used.
    pub fresh: u64,
    /// Objects alive, as the kernel counts them.
    pub live: u64,
}

impl<'g> Arena<'g> {
    fn new(ty: String, arena: Value<'g>) -> Result<Self> {
        let first = arena.field("slots")?.deref()?;
        let slots = |name: &str| Ok(arena.field(name)?.int()? / first.ty()?.size.max(1));
        let found = Self {
            ty,
            first,
            capacity: slots("size")?,
            fresh: slots("fresh")?,
            live: arena.field("live")?.int()?,
        };
        if found.capacity > CAPACITY_MAX || found.fresh > found.capacity {
            return Err(Error::Corrupt(format!(
                "the arena at {:#x} has {} of {} slots in use",
                arena.address, found.fresh, found.capacity
            )));
        }
        Ok(found)
    }

    /// Bytes of a slot.
    ///
    /// # Errors
    /// If the image's description of it is broken.
    pub fn stride(&self) -> Result<u64> {
        Ok(self.first.ty()?.size)
    }

    /// The object at a place, with its generation, if one lives there.
    fn at(&self, index: u64) -> Result<Option<(u64, Value<'g>)>> {
        if index >= self.fresh {
            return Ok(None);
        }
        let slot = self.first.nth(index)?;
        let generation = slot.field("name")?.int()? >> 32;
        if generation % 2 == 0 {
            return Ok(None);
        }
        let value = slot.field("value")?.field("value")?;
        Ok(Some((generation, value.unwrapped(&self.ty)?)))
    }
}

/// A live object.
#[derive(Clone)]
pub struct Object<'g> {
    /// Its name.
    pub name: Name,
    /// What the kernel knows of it.
    pub value: Value<'g>,
}

/// Members of a queue.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Members {
    /// In order.
    pub names: Vec<Name>,
    /// Why the list ends here, if it should not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl fmt::Display for Members {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.names.iter().map(Name::to_string).collect();
        f.write_str(&names.join(", "))?;
        match &self.error {
            Some(error) => write!(f, " <{error}>"),
            None => Ok(()),
        }
    }
}

/// The state of a kernel.
pub struct Kernel<'g> {
    /// The guest that it is in.
    pub guest: &'g Guest<'g>,
    /// `Kernel` of the image.
    pub kernel: Value<'g>,
    /// `Scheduler` of the image.
    pub scheduler: Value<'g>,
    /// What holds both, with the locks.
    pub locked: Value<'g>,
    /// By type of their objects, in lower case.
    pub arenas: BTreeMap<String, Arena<'g>>,
}

impl<'g> Kernel<'g> {
    /// Finds the kernel's state.
    ///
    /// # Errors
    /// If the image lacks it, or the kernel has not set itself up yet.
    pub fn new(guest: &'g Guest<'g>) -> Result<Self> {
        let locked = guest.find_static(LOCKED)?;
        let state = |name: &str| locked.field(name)?.field("value")?.option();
        let (Some(kernel), Some(scheduler)) = (state("kernel")?, state("scheduler")?) else {
            return Err(Error::Early);
        };
        let mut arenas = BTreeMap::new();
        for (_, value) in kernel.fields()?.into_iter().chain(scheduler.fields()?) {
            let name = short(&value.ty()?.name);
            if let Some(ty) = parameter(&name, "Arena") {
                arenas.insert(ty.to_lowercase(), Arena::new(ty.into(), value)?);
            }
        }
        Ok(Self {
            guest,
            kernel,
            scheduler,
            locked,
            arenas,
        })
    }

    /// Whether some CPU or thread has the kernel's state to itself, and may be between two steps.
    ///
    /// # Errors
    /// If the image lacks the locks.
    pub fn is_busy(&self) -> Result<bool> {
        Ok(self.locked.field("taken")?.bool()? || self.locked.field("owner")?.int()? != 0)
    }

    /// The arena of a type.
    ///
    /// # Errors
    /// If the image has none.
    pub fn arena(&self, kind: &str) -> Result<&Arena<'g>> {
        let arena = self.arenas.get(kind);
        arena.ok_or_else(|| super::types::lacks(&format!("arena of the type `{kind}`")))
    }

    /// All live objects of a type, as far as they can be found.
    ///
    /// # Errors
    /// If there is no such type, or the arena is broken.
    pub fn objects(&self, kind: &str) -> Result<Vec<Object<'g>>> {
        let arena = self.arena(kind)?;
        let mut objects = Vec::new();
        for index in 0..arena.fresh {
            if let Some((_, value)) = arena.at(index)? {
                let name = Name {
                    kind: kind.into(),
                    index,
                    alive: true,
                };
                objects.push(Object { name, value });
            }
        }
        Ok(objects)
    }

    /// The live object of that type and place.
    ///
    /// # Errors
    /// If there is none.
    pub fn object(&self, kind: &str, index: u64) -> Result<Object<'g>> {
        let found = self.arena(kind)?.at(index)?;
        let (_, value) = found.ok_or_else(|| {
            Error::Misuse(format!(
                "there is no {kind} {index}; see the view `{kind}s`"
            ))
        })?;
        let name = Name {
            kind: kind.into(),
            index,
            alive: true,
        };
        Ok(Object { name, value })
    }

    /// The name that an `Id` or a `Position` says, and the object, if it is alive.
    ///
    /// # Errors
    /// If it is neither, or cannot be read.
    pub fn find(&self, id: Value<'g>) -> Result<(Name, Option<Value<'g>>)> {
        let ty = id.ty()?;
        let ty = short(&ty.name);
        let (kind, offset, generation) = if let Some(kind) = parameter(&ty, "Id") {
            let bits = id.field("bits")?.int()?;
            (kind, bits & u64::from(u32::MAX), Some(bits >> 32))
        } else if let Some(kind) = parameter(&ty, "Position") {
            (kind, id.field("marked")?.int()?.saturating_sub(1), None)
        } else {
            return Err(Error::Image(format!("has a `{ty}` that names no object")));
        };
        let kind = kind.to_lowercase();
        let arena = self.arena(&kind)?;
        let index = offset / arena.stride()?.max(1);
        let found = arena.at(index)?;
        let same = |now| generation.is_none_or(|then| then == now);
        let value = found.and_then(|(now, value)| same(now).then_some(value));
        let name = Name {
            alive: value.is_some(),
            kind,
            index,
        };
        Ok((name, value))
    }

    /// The thread of which the scheduler knows that, and what the kernel knows of it.
    ///
    /// # Errors
    /// If the image has other arenas, or the thread is in none.
    pub fn thread_of(&self, entity: Value<'g>) -> Result<Object<'g>> {
        let place = entity.field("place")?.deref()?.address;
        let arena = self.arena("thread")?;
        let first = arena.first.field("value")?.address;
        let index = place.wrapping_sub(first) / arena.stride()?.max(1);
        match arena.at(index)? {
            Some((_, value)) if value.address == place => Ok(Object {
                name: Name {
                    kind: "thread".into(),
                    index,
                    alive: true,
                },
                value,
            }),
            _ => Err(Error::Corrupt(format!("no thread is at {place:#x}"))),
        }
    }

    /// The name that an `Id` says; that of the thread if it is what the scheduler knows of one.
    ///
    /// # Errors
    /// As [`Kernel::find`].
    pub fn name(&self, id: Value<'g>) -> Result<Name> {
        let (name, value) = self.find(id)?;
        match value {
            Some(value) if name.kind == "entity" => Ok(self.thread_of(value)?.name),
            _ => Ok(name),
        }
    }

    /// The name that an `Option<Id>` says.
    ///
    /// # Errors
    /// As [`Kernel::find`].
    pub fn name_in(&self, option: Value<'g>) -> Result<Option<Name>> {
        option.option()?.map(|id| self.name(id)).transpose()
    }

    /// The object that an `Option<Id>` leads to, if it is alive.
    ///
    /// # Errors
    /// As [`Kernel::find`].
    pub fn follow(&self, option: Value<'g>) -> Result<Option<Object<'g>>> {
        let Some(id) = option.option()? else {
            return Ok(None);
        };
        let (name, value) = self.find(id)?;
        Ok(value.map(|value| Object { name, value }))
    }

    /// Name of a thread's role in a connection.
    ///
    /// # Errors
    /// If the image has no such role.
    pub fn side(&self, number: u64) -> Result<String> {
        let ty = self.guest.types.get(self.guest.types.find(SIDE)?)?;
        let name = match &ty.kind {
            Kind::Names(names) => names.iter().find(|(value, _)| *value == number),
            _ => None,
        };
        let name = name.map(|(_, name)| name.to_lowercase());
        name.ok_or_else(|| super::types::lacks(&format!("`Side` of number {number}")))
    }

    /// The members of a queue, the broken rest aside.
    ///
    /// # Errors
    /// If the image has other queues.
    pub fn queue(&self, queue: Value<'g>) -> Result<Vec<Result<Object<'g>>>> {
        let mut members = Vec::new();
        let mut link = queue.field("head")?;
        loop {
            let next = match link.option() {
                Ok(None) => return Ok(members),
                Ok(Some(id)) => self.find(id).and_then(|(name, value)| {
                    let dead = || Error::Corrupt(format!("{name} is queued, and is not alive"));
                    let value = value.ok_or_else(dead)?;
                    if members.len() as u64 >= self.arena(&name.kind)?.fresh {
                        return Err(Error::Corrupt("the queue never ends".into()));
                    }
                    Ok(Object { name, value })
                }),
                Err(error) => Err(error),
            };
            let object = match next {
                Ok(object) => object,
                Err(refused @ Error::Image(_)) => return Err(refused),
                Err(broken) => {
                    members.push(Err(broken));
                    return Ok(members);
                }
            };
            link = object.value.field("links")?.field("next")?;
            members.push(Ok(object));
        }
    }

    /// Names of the members of a queue.
    ///
    /// # Errors
    /// As [`Kernel::queue`].
    pub fn members(&self, queue: Value<'g>) -> Result<Members> {
        let mut members = Members::default();
        for member in self.queue(queue)? {
            let name = member.and_then(|member| match member.name.kind.as_str() {
                "entity" => Ok(self.thread_of(member.value)?.name),
                _ => Ok(member.name),
            });
            match name {
                Ok(name) => members.names.push(name),
                Err(error) => members.error = Some(error.to_string()),
            }
        }
        Ok(members)
    }
}

/// Physical address of the memory that names an object, by its header; 0 if there is none.
///
/// # Errors
/// If it is no header.
pub fn memory_of(header: Value<'_>) -> Result<u64> {
    // The low bits are its type.
    Ok(header.field("memory")?.int()? & !(OBJECT_SIZE - 1))
}

/// The parameter of a type such as `Arena<Thread>`.
fn parameter<'n>(name: &'n str, of: &str) -> Option<&'n str> {
    name.strip_prefix(of)?.strip_prefix('<')?.strip_suffix('>')
}
