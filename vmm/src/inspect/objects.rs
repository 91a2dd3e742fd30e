//! Ports, port sets, mutexes, condition variables and references, and the table of all objects by
//! where they lie.

use std::collections::BTreeMap;

use fluke_abi::layout::PAGE_SIZE;
use serde::Serialize;

use super::kernel::{Kernel, Members, Name, Object, memory_of};
use super::table::{Line, Listing, Row, hex, hex_or_dash, notes, or_dash};
use super::{Error, Report, Result};

/// What every object has.
#[derive(Serialize)]
struct Header {
    name: Name,
    hash: u64,
    /// Physical address of the memory that names it; 0 if none does.
    memory: u64,
}

impl Header {
    fn of(object: &Object<'_>) -> Result<Self> {
        let header = object.value.field("header")?;
        Ok(Self {
            name: object.name.clone(),
            hash: header.field("hash")?.int()?,
            memory: memory_of(header)?,
        })
    }

    fn cells(&self) -> [String; 3] {
        let Self { name, hash, memory } = self;
        [
            name.index.to_string(),
            hash.to_string(),
            hex_or_dash(*memory),
        ]
    }
}

fn row<const N: usize>(header: &Header, rest: [String; N]) -> Vec<String> {
    header.cells().into_iter().chain(rest).collect()
}

#[derive(Serialize)]
struct Port {
    #[serde(flatten)]
    header: Header,
    /// What its server gets with each message.
    alias: u64,
    pset: Option<Name>,
    /// Threads with a message for it, or which ask for time.
    clients: Members,
    /// Threads that donate their time while they wait for a message.
    donors: Members,
    /// Threads that asked for time and have none.
    wanting: Members,
}

impl Row for Port {
    const COLUMNS: &'static [&'static str] = &[
        "PORT",
        "HASH",
        "MEMORY",
        "ALIAS",
        "SET",
        "CLIENTS",
        "DONORS",
        "WANTING TIME",
    ];

    fn cells(&self) -> Vec<String> {
        row(
            &self.header,
            [
                hex(self.alias),
                or_dash(&self.pset.as_ref().map(|pset| pset.index)),
                self.clients.to_string(),
                self.donors.to_string(),
                self.wanting.to_string(),
            ],
        )
    }
}

/// The view of ports.
pub fn ports(kernel: &Kernel<'_>) -> Result<Report> {
    let port = |object: &Object<'_>| {
        let members = |field: &str| kernel.members(object.value.field(field)?);
        Ok(Port {
            header: Header::of(object)?,
            alias: object.value.field("alias")?.int()?,
            pset: kernel.name_in(object.value.field("pset")?)?,
            clients: members("clients")?,
            donors: members("donors")?,
            wanting: members("wanting")?,
        })
    };
    Listing::of(kernel, "port", port)?.report()
}

#[derive(Serialize)]
struct Pset {
    #[serde(flatten)]
    header: Header,
    ports: Members,
    /// Threads that wait for a message.
    servers: Members,
}

impl Row for Pset {
    const COLUMNS: &'static [&'static str] = &["SET", "HASH", "MEMORY", "PORTS", "WAITING SERVERS"];

    fn cells(&self) -> Vec<String> {
        row(
            &self.header,
            [self.ports.to_string(), self.servers.to_string()],
        )
    }
}

/// The view of port sets.
pub fn psets(kernel: &Kernel<'_>) -> Result<Report> {
    let pset = |object: &Object<'_>| {
        Ok(Pset {
            header: Header::of(object)?,
            ports: kernel.members(object.value.field("ports")?)?,
            servers: kernel.members(object.value.field("servers")?)?,
        })
    };
    Listing::of(kernel, "pset", pset)?.report()
}

#[derive(Serialize)]
struct Mutex {
    #[serde(flatten)]
    header: Header,
    locked: bool,
    owner: Option<Name>,
    waiters: Members,
}

impl Row for Mutex {
    const COLUMNS: &'static [&'static str] =
        &["MUTEX", "HASH", "MEMORY", "LOCKED", "OWNER", "WAITERS"];

    fn cells(&self) -> Vec<String> {
        let locked = if self.locked { "yes" } else { "no" };
        let waiters = self.waiters.to_string();
        row(&self.header, [locked.into(), or_dash(&self.owner), waiters])
    }
}

/// The view of mutexes.
pub fn mutexes(kernel: &Kernel<'_>) -> Result<Report> {
    let mutex = |object: &Object<'_>| {
        Ok(Mutex {
            header: Header::of(object)?,
            locked: object.value.field("locked")?.bool()?,
            owner: kernel.name_in(object.value.field("owner")?)?,
            waiters: kernel.members(object.value.field("waiters")?)?,
        })
    };
    Listing::of(kernel, "mutex", mutex)?.report()
}

#[derive(Serialize)]
struct Cond {
    #[serde(flatten)]
    header: Header,
    inheritor: Option<Name>,
    waiters: Members,
}

impl Row for Cond {
    const COLUMNS: &'static [&'static str] = &["COND", "HASH", "MEMORY", "INHERITOR", "WAITERS"];

    fn cells(&self) -> Vec<String> {
        row(
            &self.header,
            [or_dash(&self.inheritor), self.waiters.to_string()],
        )
    }
}

/// The view of condition variables.
pub fn conds(kernel: &Kernel<'_>) -> Result<Report> {
    let cond = |object: &Object<'_>| {
        Ok(Cond {
            header: Header::of(object)?,
            inheritor: kernel.name_in(object.value.field("inheritor")?)?,
            waiters: kernel.members(object.value.field("waiters")?)?,
        })
    };
    Listing::of(kernel, "cond", cond)?.report()
}

#[derive(Serialize)]
struct Ref {
    #[serde(flatten)]
    header: Header,
    /// What it links to; none for a null reference.
    link: Option<Name>,
}

impl Row for Ref {
    const COLUMNS: &'static [&'static str] = &["REF", "HASH", "MEMORY", "LINKS TO"];

    fn cells(&self) -> Vec<String> {
        row(&self.header, [or_dash(&self.link)])
    }
}

/// The view of references.
pub fn refs(kernel: &Kernel<'_>) -> Result<Report> {
    let link = |object: &Object<'_>| {
        let (_, content) = object.value.field("link")?.variant()?;
        let target = content.fields()?.into_iter().next();
        Ok(Ref {
            header: Header::of(object)?,
            link: target.map(|(_, id)| kernel.name(id)).transpose()?,
        })
    };
    Listing::of(kernel, "ref", link)?.report()
}

/// The objects of a page frame.
#[derive(Serialize)]
struct Frame {
    /// Physical address; 0 for objects that no memory names.
    frame: u64,
    objects: Vec<Header>,
}

impl Row for Frame {
    const COLUMNS: &'static [&'static str] = &["FRAME", "OBJECTS"];

    fn cells(&self) -> Vec<String> {
        let object = |Header { name, memory, .. }: &Header| match self.frame {
            0 => name.to_string(),
            _ => format!("+{:#05x} {name}", memory % PAGE_SIZE),
        };
        let objects: Vec<_> = self.objects.iter().map(object).collect();
        let frame = match self.frame {
            0 => "without memory".into(),
            frame => hex(frame),
        };
        vec![frame, objects.join(", ")]
    }
}

/// The view of the object table: made from the objects, and compared with the kernel's.
pub fn table(kernel: &Kernel<'_>) -> Result<Report> {
    let mut frames: BTreeMap<u64, Vec<Header>> = BTreeMap::new();
    let mut broken = Vec::new();
    for kind in kernel.arenas.keys() {
        for object in kernel.objects(kind)? {
            // What the scheduler keeps of objects has no header.
            if object
                .value
                .fields()?
                .iter()
                .all(|(name, _)| name != "header")
            {
                break;
            }
            match Header::of(&object) {
                Ok(header) => {
                    let frame = header.memory & !(PAGE_SIZE - 1);
                    frames.entry(frame).or_default().push(header);
                }
                Err(refused @ Error::Image(_)) => return Err(refused),
                Err(error) => broken.push(Line::Broken {
                    name: object.name,
                    error: error.to_string(),
                }),
            }
        }
    }
    let mut notes = notes(kernel)?;
    notes.extend(check_heads(kernel, &frames)?);
    let rows = frames.into_iter().map(|(frame, mut objects)| {
        objects.sort_by_key(|header| header.memory);
        Line::Good(Frame { frame, objects })
    });
    let rows = rows.chain(broken).collect();
    Listing { notes, rows }.report()
}

/// Compares the frames that the table has objects in with those where objects are.
fn check_heads(kernel: &Kernel<'_>, frames: &BTreeMap<u64, Vec<Header>>) -> Result<Vec<String>> {
    let (heads, count) = kernel.kernel.field("objects")?.field("heads")?.elements()?;
    let mut wrong = Vec::new();
    for frame in frames.keys().filter(|frame| **frame != 0) {
        let number = frame / PAGE_SIZE;
        let listed = number < count && heads.nth(number)?.option()?.is_some();
        if !listed {
            wrong.push(format!("the kernel's table has nothing at {frame:#x}"));
        }
    }
    Ok(wrong)
}
