//! Threads: whether they run, which call their registers name, what they wait for, and whom they are
//! connected with.

use std::fmt::Write;

use fluke_abi::code::{Exception, Status};
use fluke_abi::entry::{Convention, Entry};
use fluke_abi::ipc::CallWord;
use fluke_abi::layout::{GATE, GATE_DONE};
use fluke_abi::state::ThreadFlags;
use serde::Serialize;

use super::cpus::{Cpu, cpus};
use super::kernel::{Kernel, Name, Object, memory_of};
use super::table::{Listing, Pairs, Row, hex, notes, or_dash, report};
use super::value::Value;
use super::{Machine, Report, Result};

/// Registers that carry the parameters of a call, in order.
const PARAMETERS: [&str; 8] = ["rdi", "rsi", "rdx", "r10", "r8", "r9", "r12", "r13"];

/// A thread.
#[derive(Serialize)]
pub struct Thread {
    name: Name,
    hash: u64,
    /// Physical address of the memory that names it.
    memory: u64,
    /// The same in its own space.
    address: u64,
    space: Option<Name>,
    priority: u64,
    state: State,
    call: Call,
    /// Partners in reliable connections.
    connections: Vec<Connection>,
    /// The client whose idempotent message it serves.
    serves: Option<Name>,
    /// The port that it asks for time.
    scheduler: Option<Name>,
    /// Who last donated time to it.
    donor: Option<Name>,
}

/// Whether a thread runs.
#[derive(Serialize)]
pub struct State {
    /// `Run` of the kernel: stopped, scheduled, or waiting.
    run: String,
    /// Where, as the scheduler has it: off, ready, running, asleep, locking.
    scheduled: String,
    /// The CPU that it runs on, or whose run queue it is in.
    cpu: Option<u64>,
    /// When it wakes, nanoseconds since boot.
    deadline: Option<u64>,
    wait: Option<Wait>,
}

/// What a thread waits for.
#[derive(Serialize)]
pub struct Wait {
    /// `Wait` of the kernel.
    kind: String,
    /// The objects that it names.
    objects: Vec<Name>,
    /// The same in words.
    text: String,
}

/// What the registers of a thread say.
#[derive(Serialize)]
pub struct Call {
    /// `about to call`, `in`, `done`, or `user code`.
    phase: &'static str,
    entry: Option<&'static str>,
    arguments: Pairs<u64>,
    /// With what the call ended.
    status: Option<String>,
    rip: u64,
    /// Where the registers are: `frame`, or a vCPU.
    registers: String,
}

/// A reliable connection.
#[derive(Serialize)]
pub struct Connection {
    /// `client` or `server`.
    role: String,
    partner: Name,
    /// Whether this thread is the sender.
    sender: bool,
}

impl State {
    fn text(&self) -> String {
        match (&self.wait, self.cpu, self.deadline) {
            (Some(wait), ..) => format!("waits for {}", wait.text),
            (_, Some(cpu), _) => format!("{} on CPU {cpu}", self.scheduled),
            (_, _, Some(deadline)) => {
                format!(
                    "asleep until {}.{:09} s",
                    deadline / 1_000_000_000,
                    deadline % 1_000_000_000
                )
            }
            _ if self.run == "scheduled" => match self.scheduled.as_str() {
                "locking" => "wants the kernel".into(),
                other => other.into(),
            },
            _ => self.run.clone(),
        }
    }
}

impl Call {
    fn text(&self) -> String {
        let arguments = self.arguments.0.iter();
        let arguments = arguments.map(|(name, value)| format!("{name} {value:#x}"));
        let arguments = arguments.collect::<Vec<_>>().join(", ");
        match (self.entry, &self.status) {
            (Some(entry), _) => format!("{} {entry}({arguments})", self.phase),
            (None, Some(status)) => format!("{}: {status}", self.phase),
            (None, None) => format!("{} at {}", self.phase, hex(self.rip)),
        }
    }
}

impl Row for Thread {
    const COLUMNS: &'static [&'static str] = &[
        "THREAD",
        "HASH",
        "MEMORY",
        "SPACE",
        "PRIORITY",
        "STATE",
        "REGISTERS SAY",
        "LINKS",
    ];

    fn cells(&self) -> Vec<String> {
        vec![
            self.name.index.to_string(),
            self.hash.to_string(),
            hex(self.memory),
            self.space
                .as_ref()
                .map_or("-".into(), |s| s.index.to_string()),
            self.priority.to_string(),
            self.state.text(),
            self.call.text(),
            self.links(),
        ]
    }
}

impl Thread {
    fn links(&self) -> String {
        let mut links: Vec<_> = self.connections.iter().map(Connection::text).collect();
        let others = [
            ("answers", &self.serves),
            ("scheduled by", &self.scheduler),
            ("time from", &self.donor),
        ];
        for (what, other) in others {
            links.extend(other.as_ref().map(|other| format!("{what} {other}")));
        }
        match links.is_empty() {
            true => "-".into(),
            false => links.join("; "),
        }
    }
}

impl Connection {
    fn text(&self) -> String {
        let direction = if self.sender {
            "sends to"
        } else {
            "receives from"
        };
        format!("{}, {direction} {}", self.role, self.partner)
    }
}

/// The view of all threads.
pub fn all(kernel: &Kernel<'_>, machine: &Machine<'_>) -> Result<Report> {
    let cpus = cpus(kernel, machine)?;
    Listing::of(kernel, "thread", |object| describe(kernel, &cpus, object))?.report()
}

/// What a CPU is at, in a few words.
pub fn on_cpu(kernel: &Kernel<'_>, machine: &Machine<'_>, number: u32) -> Result<String> {
    machine.vcpu(number)?;
    let cpus = cpus(kernel, machine)?;
    let cpu = cpus.get(number as usize).ok_or(super::Error::Early)?;
    let mode = cpu.mode;
    Ok(match &cpu.thread {
        Some(thread) => {
            let object = kernel.object("thread", thread.index)?;
            format!(
                "{mode}: {thread}, {}",
                call(object.value, Some(cpu))?.text()
            )
        }
        None => format!("{mode}: no thread"),
    })
}

fn describe(kernel: &Kernel<'_>, cpus: &[Cpu], object: &Object<'_>) -> Result<Thread> {
    let thread = object.value;
    let number = |field: &str| thread.field(field)?.int();
    let link = |field: &str| kernel.name_in(thread.field(field)?);
    let header = thread.field("header")?;
    Ok(Thread {
        name: object.name.clone(),
        hash: header.field("hash")?.int()?,
        memory: memory_of(header)?,
        address: number("thread_va")?,
        space: link("space")?,
        priority: number("priority")?,
        state: state(kernel, thread)?,
        call: call(thread, cpus.iter().find(|cpu| cpu.runs(&object.name)))?,
        connections: connections(kernel, thread)?,
        serves: link("idempotent_client")?,
        scheduler: link("scheduler")?,
        donor: link("donor")?,
    })
}

fn state(kernel: &Kernel<'_>, thread: Value<'_>) -> Result<State> {
    let (run, content) = thread.field("run")?.variant()?;
    let mut state = State {
        run: run.to_lowercase(),
        scheduled: "gone".into(),
        cpu: None,
        deadline: None,
        wait: None,
    };
    if run == "Waiting" {
        state.wait = Some(wait(kernel, thread, content.field("__0")?)?);
    }
    if let (_, Some(entity)) = kernel.find(thread.field("entity")?)? {
        let (name, _) = entity.field("state")?.variant()?;
        state.scheduled = name.to_lowercase();
        match name.as_str() {
            "Ready" | "Running" => state.cpu = Some(entity.field("cpu")?.int()?),
            "Asleep" => state.deadline = Some(entity.field("deadline")?.int()?),
            _ => {}
        }
    }
    Ok(state)
}

/// What a thread waits for, in Fluke's terms; a wait that is not known here in the kernel's.
fn wait(kernel: &Kernel<'_>, thread: Value<'_>, wait: Value<'_>) -> Result<Wait> {
    let (kind, content) = wait.variant()?;
    let mut objects = Vec::new();
    for (_, field) in content.fields()? {
        let name = super::types::short(&field.ty()?.name);
        if name.starts_with("Id<") || name.starts_with("Position<") {
            objects.push(kernel.name(field)?);
        } else if name == "Side" {
            // The partner in that role.
            let (first, _) = thread.field("partners")?.elements()?;
            objects.extend(kernel.name_in(first.nth(field.int()?)?)?);
        }
    }
    let nobody = || "a partner that is gone".to_string();
    let first = objects.first().map_or_else(nobody, Name::to_string);
    let text = match kind.as_str() {
        "Mutex" => format!("{first} to come free"),
        "Cond" => format!("{first} to be signalled"),
        "Port" => match thread.field("exception")?.option()? {
            Some(message) => {
                let code = message.field("code")?.int()?;
                format!("the keeper at {first} to handle {}", exception(code))
            }
            None => format!("a server at {first} to take its message"),
        },
        "Pset" => format!("a message on {first}"),
        "Reply" => format!("the reply of {first}"),
        "Send" => format!("{first} to receive"),
        "Receive" => format!("{first} to send"),
        "Over" => format!("{first} to acknowledge the reversal"),
        "Ack" => format!("{first} to turn the connection over"),
        "Stop" => format!("{first} to leave its CPU"),
        "Schedule" => {
            let port = objects.get(1).map_or_else(nobody, Name::to_string);
            format!("{first} to use its time, or a message on {port}")
        }
        "Ask" => format!("its scheduler at {first} to hear that it wants time"),
        "Time" => format!("its scheduler at {first} to give it time"),
        "Forever" => "nothing: an exception that nobody handles".into(),
        _ => wait.to_string(),
    };
    Ok(Wait {
        kind,
        objects,
        text,
    })
}

fn exception(code: u64) -> String {
    match Exception::from_number(code) {
        Some(exception) => format!("the exception {}", exception.name()),
        None => format!("exception {code}"),
    }
}

fn connections(kernel: &Kernel<'_>, thread: Value<'_>) -> Result<Vec<Connection>> {
    let (first, count) = thread.field("partners")?.elements()?;
    let flags = ThreadFlags::from_bits_retain(thread.field("flags")?.int()?);
    let mut connections = Vec::new();
    for side in 0..count {
        if let Some(partner) = kernel.name_in(first.nth(side)?)? {
            let role = kernel.side(side)?;
            let sender = match role.as_str() {
                "client" => ThreadFlags::CLIENT_SENDER,
                _ => ThreadFlags::SERVER_SENDER,
            };
            connections.push(Connection {
                role,
                partner,
                sender: flags.contains(sender),
            });
        }
    }
    Ok(connections)
}

/// What the registers say: those of the CPU for a thread that is in user mode, else those that the
/// kernel has.
fn call(thread: Value<'_>, cpu: Option<&Cpu>) -> Result<Call> {
    let (registers, place) = registers(thread, cpu)?;
    let register = |name: &str| {
        let found = registers.iter().find(|(register, _)| register == name);
        found.map_or(0, |(_, value)| *value)
    };
    let word = CallWord(register("rax"));
    let rip = register("rip");
    let mut call = Call {
        phase: "user code",
        entry: None,
        arguments: Pairs(Vec::new()),
        status: None,
        rip,
        registers: place,
    };
    if rip == GATE_DONE {
        call.phase = "done";
        let status = word.status().filter(|_| word.0 <= u64::from(u16::MAX));
        call.status = Some(match status {
            Some(Status::Success) | None => hex(word.0),
            Some(status) => status.name().into(),
        });
    }
    if let (GATE, Some(entry)) = (rip, Entry::from_number(word.number())) {
        let row = entry.row();
        call.phase = match thread.field("in_call")?.bool()? {
            true => "in",
            false => "about to call",
        };
        call.entry = Some(row.name);
        let mut argument = |name: &str, value: u64| {
            call.arguments.0.push((name.into(), value));
        };
        match row.convention {
            Convention::Registers => {
                for ((name, _), register_name) in row.parameters.iter().zip(PARAMETERS) {
                    argument(name, register(register_name));
                }
            }
            Convention::Message => {
                // The first parameter, if it is not the message, is in `rdi`.
                let first = row.parameters.first().filter(|(name, _)| *name != "params");
                if let Some((name, _)) = first {
                    argument(name, register("rdi"));
                }
                for (name, register_name) in [
                    ("send", "rsi"),
                    ("send_words", "rdx"),
                    ("receive", "r10"),
                    ("receive_words", "r8"),
                ] {
                    argument(name, register(register_name));
                }
                for (name, count) in [
                    ("send_buffers", word.send_buffers()),
                    ("send_refs", word.send_refs()),
                    ("receive_buffers", word.recv_buffers()),
                    ("receive_refs", word.recv_refs()),
                ] {
                    if count != 0 {
                        argument(name, count.into());
                    }
                }
            }
        }
    }
    Ok(call)
}

/// User registers of a thread, and where they are.
fn registers(thread: Value<'_>, cpu: Option<&Cpu>) -> Result<(Vec<(String, u64)>, String)> {
    if let Some(cpu) = cpu.filter(|cpu| cpu.mode == "user") {
        return Ok((cpu.general(), format!("vCPU {}", cpu.number)));
    }
    let mut registers = Vec::new();
    for (name, value) in thread.field("frame")?.fields()? {
        registers.push((name, value.int()?));
    }
    let place = match cpu.filter(|cpu| cpu.in_user == Some(true)) {
        Some(cpu) => format!("frame, on the way between it and vCPU {}", cpu.number),
        None => "frame".into(),
    };
    Ok((registers, place))
}

/// All of a thread.
#[derive(Serialize)]
struct Whole {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    notes: Vec<String>,
    #[serde(flatten)]
    thread: Thread,
    /// User registers.
    values: Pairs<u64>,
    /// All that the kernel knows of the thread, as it knows it.
    kernel: Pairs<String>,
    /// All that the scheduler knows of it.
    scheduling: Pairs<String>,
}

/// The view of one thread.
pub fn one(kernel: &Kernel<'_>, machine: &Machine<'_>, id: u64) -> Result<Report> {
    let cpus = cpus(kernel, machine)?;
    let object = kernel.object("thread", id)?;
    let cpu = cpus.iter().find(|cpu| cpu.runs(&object.name));
    let (registers, _) = registers(object.value, cpu)?;
    let (_, entity) = kernel.find(object.value.field("entity")?)?;
    let whole = Whole {
        notes: notes(kernel)?,
        thread: describe(kernel, &cpus, &object)?,
        values: Pairs(registers),
        kernel: fields(object.value, &["frame"])?,
        scheduling: entity.map_or_else(|| Ok(Pairs(Vec::new())), |e| fields(e, &["fpu"]))?,
    };
    let mut text = String::new();
    for note in &whole.notes {
        let _ = writeln!(text, "note: {note}");
    }
    let thread = &whole.thread;
    let _ = writeln!(
        text,
        "{}, hash {}, memory {} (in its space {}), {}, priority {}\n{}\n{}\nlinks: {}\n\nRegisters, of {}:",
        thread.name,
        thread.hash,
        hex(thread.memory),
        hex(thread.address),
        or_dash(&thread.space),
        thread.priority,
        thread.state.text(),
        thread.call.text(),
        thread.links(),
        thread.call.registers,
    );
    for row in whole.values.0.chunks(4) {
        for (name, value) in row {
            let _ = write!(text, "  {name:>6} {value:#018x}");
        }
        text.push('\n');
    }
    for (title, fields) in [("Kernel", &whole.kernel), ("Scheduler", &whole.scheduling)] {
        let _ = writeln!(text, "\n{title}:");
        for (name, value) in &fields.0 {
            let _ = writeln!(text, "  {name}: {value}");
        }
    }
    report(text, &whole)
}

/// The fields of a structure as text, some left out.
fn fields(value: Value<'_>, without: &[&str]) -> Result<Pairs<String>> {
    let fields = value.fields()?.into_iter();
    let shown = fields.filter(|(name, _)| !without.contains(&name.as_str()));
    Ok(Pairs(
        shown
            .map(|(name, value)| (name, value.to_string()))
            .collect(),
    ))
}
