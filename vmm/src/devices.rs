//! The devices of the machine: console, kernel log, exit and event ports.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use fluke_abi::port::{self, Event};
use serde::{Deserialize, Serialize};
use vm_superio::Serial;
use vm_superio::serial::{NoEvents, SerialState};

use crate::bus::{Access, Bus, Overlap, PioDevice, Signal};
use crate::config::ConsoleSink;

/// Lines of the kernel log kept for a panic's message, for each vCPU.
const LINES_KEPT: usize = 16;
/// Longest line of the kernel log, bytes; what is longer is split.
const LINE_BYTES: usize = 1024;
/// Longest console output held back while no line ends, bytes.
const CONSOLE_BYTES: usize = 4096;

/// The devices that somebody else than the bus has to reach.
#[derive(Clone)]
pub struct Devices {
    /// The console.
    pub console: Arc<Mutex<Console>>,
    /// The kernel log.
    pub log: Arc<Mutex<KernelLog>>,
    /// When the first user-mode instruction was about to run.
    pub first_user: Arc<OnceLock<Instant>>,
}

impl Devices {
    /// Makes the devices and puts them on the bus.
    ///
    /// # Errors
    /// If the bus has no place for one.
    pub fn new(bus: &mut Bus, sink: ConsoleSink) -> Result<Self, Overlap> {
        let devices = Self {
            console: Arc::new(Mutex::new(Console::new(sink))),
            log: Arc::default(),
            first_user: Arc::default(),
        };
        bus.insert(port::CONSOLE, port::CONSOLE_PORTS, devices.console.clone())?;
        bus.insert(port::KERNEL_LOG, 1, devices.log.clone())?;
        bus.insert(port::EXIT, 4, Arc::new(Mutex::new(ExitPort)))?;
        let events = EventPort(devices.first_user.clone());
        bus.insert(port::EVENT, 4, Arc::new(Mutex::new(events)))?;
        Ok(devices)
    }

    /// Writes out what the console holds back.
    pub fn flush(&self) {
        let mut console = self.console.lock().unwrap_or_else(PoisonError::into_inner);
        console.serial.writer_mut().write_out();
    }

    /// The state of all devices.
    pub fn save(&self) -> DevicesState {
        let mut console = self.console.lock().unwrap_or_else(PoisonError::into_inner);
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        DevicesState {
            serial: console.serial.state(),
            held: console.serial.writer_mut().held.clone(),
            log: log.clone(),
        }
    }

    /// Gives all devices their state.
    pub fn restore(&self, state: &DevicesState) {
        let mut console = self.console.lock().unwrap_or_else(PoisonError::into_inner);
        console.restore(&state.serial, &state.held);
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.clone_from(&state.log);
    }
}

/// State of the devices.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DevicesState {
    #[serde(with = "SerialRegisters")]
    serial: SerialState,
    /// Console output held back.
    held: Vec<u8>,
    log: KernelLog,
}

/// [`SerialState`], for serde.
#[derive(Serialize, Deserialize)]
#[serde(remote = "SerialState")]
struct SerialRegisters {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

/// The console: a 16550 without interrupts, whose output goes to a sink line by line.
pub struct Console {
    serial: Serial<NoInterrupt, NoEvents, LineWriter>,
}

struct NoInterrupt;

impl vm_superio::Trigger for NoInterrupt {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        Ok(())
    }
}

impl Console {
    fn new(sink: ConsoleSink) -> Self {
        let writer = LineWriter {
            sink,
            held: Vec::new(),
            broken: false,
        };
        Self {
            serial: Serial::new(NoInterrupt, writer),
        }
    }

    fn restore(&mut self, state: &SerialState, held: &[u8]) {
        let old = self.serial.writer_mut();
        let writer = LineWriter {
            sink: old.sink.clone(),
            held: held.to_vec(),
            broken: old.broken,
        };
        // Only a state with more input than fits is refused, and there is never any input.
        if let Ok(serial) = Serial::from_state(state, NoInterrupt, NoEvents, writer) {
            self.serial = serial;
        }
    }
}

impl PioDevice for Console {
    fn read(&mut self, access: Access, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            let within = (i % usize::from(access.size.max(1))) as u16;
            *byte = self.serial.read((access.offset + within) as u8);
        }
    }

    fn write(&mut self, access: Access, data: &[u8]) -> Option<Signal> {
        for (i, byte) in data.iter().enumerate() {
            let within = (i % usize::from(access.size.max(1))) as u16;
            // The writer takes everything, and there is no interrupt to fail.
            let _ = self.serial.write((access.offset + within) as u8, *byte);
        }
        None
    }
}

/// Gathers console bytes into lines, so that a line costs one system call.
struct LineWriter {
    sink: ConsoleSink,
    held: Vec<u8>,
    /// The reader has gone (a closed pipe, a full disk): output is dropped from then on.
    broken: bool,
}

impl LineWriter {
    fn write_out(&mut self) {
        let result = match &self.sink {
            _ if self.broken => Ok(()),
            ConsoleSink::Stdout => write_all(io::stdout().lock(), &self.held),
            ConsoleSink::Stderr => write_all(io::stderr().lock(), &self.held),
            ConsoleSink::Buffer(buffer) => {
                let mut buffer = buffer.lock().unwrap_or_else(PoisonError::into_inner);
                buffer.extend_from_slice(&self.held);
                Ok(())
            }
        };
        if let Err(error) = result {
            tracing::warn!("console output is lost from here on: {error}");
            self.broken = true;
        }
        self.held.clear();
    }
}

fn write_all(mut out: impl Write, bytes: &[u8]) -> io::Result<()> {
    out.write_all(bytes)?;
    out.flush()
}

impl Write for LineWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.held.extend_from_slice(bytes);
        if bytes.contains(&b'\n') || self.held.len() >= CONSOLE_BYTES {
            self.write_out();
        }
        Ok(bytes.len())
    }

    /// The serial port flushes after each byte; lines are what is wanted.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The kernel log: lines go to the host's log, and the last ones are kept for a panic.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct KernelLog {
    vcpus: BTreeMap<u32, VcpuLog>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct VcpuLog {
    partial: Vec<u8>,
    lines: VecDeque<String>,
}

impl KernelLog {
    /// The message of a panic on a vCPU: what it logged since its last line that starts with
    /// `panic`, or its last line.
    pub fn panic_message(&mut self, vcpu: u32) -> String {
        let log = self.vcpus.entry(vcpu).or_default();
        log.end_line(vcpu);
        let last = log.lines.len().saturating_sub(1);
        let from = log.lines.iter().rposition(|l| l.starts_with("panic"));
        let lines: Vec<&str> = log
            .lines
            .range(from.unwrap_or(last)..)
            .map(|l| l.strip_prefix("panic:").unwrap_or(l).trim())
            .collect();
        match lines.join("; ") {
            message if message.is_empty() => "no message".into(),
            message => message,
        }
    }
}

impl VcpuLog {
    fn end_line(&mut self, vcpu: u32) {
        if self.partial.is_empty() {
            return;
        }
        let line = String::from_utf8_lossy(&self.partial)
            .trim_end()
            .to_string();
        self.partial.clear();
        tracing::info!(target: "kernel", vcpu, "{line}");
        if self.lines.len() == LINES_KEPT {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }
}

impl PioDevice for KernelLog {
    fn write(&mut self, access: Access, data: &[u8]) -> Option<Signal> {
        let log = self.vcpus.entry(access.vcpu).or_default();
        for byte in data {
            if *byte == b'\n' || log.partial.len() >= LINE_BYTES {
                log.end_line(access.vcpu);
            }
            if *byte != b'\n' {
                log.partial.push(*byte);
            }
        }
        None
    }
}

struct ExitPort;

impl PioDevice for ExitPort {
    fn write(&mut self, _access: Access, data: &[u8]) -> Option<Signal> {
        Some(Signal::Exit(number(data)))
    }
}

struct EventPort(Arc<OnceLock<Instant>>);

impl PioDevice for EventPort {
    fn write(&mut self, access: Access, data: &[u8]) -> Option<Signal> {
        let Some(event) = Event::from_number(number(data)) else {
            tracing::warn!(vcpu = access.vcpu, "unknown kernel event {}", number(data));
            return None;
        };
        if event == Event::FirstUser {
            self.0.get_or_init(Instant::now);
            tracing::debug!("first user-mode instruction");
        }
        Some(Signal::Event(event))
    }
}

/// The first element of a write, at most 32 bits of it.
fn number(data: &[u8]) -> u32 {
    let mut bytes = [0; 4];
    let size = data.len().min(4);
    bytes[..size].copy_from_slice(&data[..size]);
    u32::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> (Bus, Devices, Arc<Mutex<Vec<u8>>>) {
        let mut bus = Bus::default();
        let buffer: Arc<Mutex<Vec<u8>>> = Arc::default();
        let devices = Devices::new(&mut bus, ConsoleSink::Buffer(buffer.clone())).unwrap();
        (bus, devices, buffer)
    }

    #[test]
    fn console_bytes_come_out_as_lines() {
        let (bus, devices, buffer) = machine();
        bus.write(0, port::CONSOLE, 1, b"hel").unwrap();
        assert_eq!(*buffer.lock().unwrap(), b"");
        bus.write(0, port::CONSOLE, 1, b"lo\nwor").unwrap();
        assert_eq!(*buffer.lock().unwrap(), b"hello\n");
        devices.flush();
        assert_eq!(*buffer.lock().unwrap(), b"hello\nwor");
    }

    #[test]
    fn the_console_says_it_is_ready() {
        let (bus, ..) = machine();
        let mut status = [0];
        bus.read(0, port::CONSOLE + 5, 1, &mut status).unwrap();
        assert_eq!(status[0] & 0x20, 0x20, "transmitter holding register empty");
    }

    #[test]
    fn panic_messages_of_vcpus_do_not_mix() {
        let (bus, devices, _) = machine();
        for byte in b"booting\npanic: one\nmore" {
            bus.write(0, port::KERNEL_LOG, 1, &[*byte]).unwrap();
            bus.write(1, port::KERNEL_LOG, 1, b"x").unwrap();
        }
        let mut log = devices.log.lock().unwrap();
        assert_eq!(log.panic_message(0), "one; more");
        assert!(log.panic_message(1).starts_with("xxx"));
        assert_eq!(log.panic_message(2), "no message");
    }

    #[test]
    fn exit_and_event_ports_signal() {
        let (bus, devices, _) = machine();
        let exit = bus.write(0, port::EXIT, 4, &7u32.to_le_bytes());
        assert_eq!(exit, Ok(Some(Signal::Exit(7))));
        let event = |n: u32| bus.write(0, port::EVENT, 4, &n.to_le_bytes());
        assert_eq!(event(1), Ok(Some(Signal::Event(Event::FirstUser))));
        assert!(devices.first_user.get().is_some());
        assert_eq!(event(99), Ok(None));
    }
}
