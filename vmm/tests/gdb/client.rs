//! The least that speaks gdb's protocol.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use super::PATIENCE;

trait Stream: Read + Write {}

impl<T: Read + Write> Stream for T {}

/// A debugger.
pub struct Client {
    stream: Box<dyn Stream>,
}

/// Where the protocol has registers, by their numbers.
pub const RAX: usize = 0;
pub const RIP: usize = 16;
pub const CS: usize = 18;
pub const GS_BASE: usize = 59;

impl Client {
    pub fn connect(address: &str) -> Self {
        let stream: Box<dyn Stream> = if address.contains('/') {
            let stream = UnixStream::connect(address).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            Box::new(stream)
        } else {
            let stream = TcpStream::connect(address).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            Box::new(stream)
        };
        Self { stream }
    }

    /// Sends bytes as they are; whether they were taken.
    pub fn send_raw(&mut self, bytes: &[u8]) -> bool {
        self.stream.write_all(bytes).is_ok()
    }

    pub fn send(&mut self, packet: &str) {
        assert!(self.send_raw(&framed(packet.as_bytes())), "it hung up");
    }

    fn byte(&mut self) -> Option<u8> {
        let mut byte = [0];
        match self.stream.read(&mut byte) {
            Ok(1..) => Some(byte[0]),
            Ok(0) => None,
            // It had not read all that was sent.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => None,
            Err(error) => panic!("it says nothing: {error}"),
        }
    }

    /// The next packet, without acknowledgements, and with runs written out; none if it has hung up.
    pub fn receive(&mut self) -> Option<String> {
        while self.byte()? != b'$' {}
        let mut packet = Vec::new();
        let mut sum = 0_u8;
        loop {
            let byte = self.byte()?;
            if byte == b'#' {
                break;
            }
            sum = sum.wrapping_add(byte);
            if packet.last() == Some(&b'*') {
                packet.pop();
                let last = *packet.last().unwrap();
                packet.extend(std::iter::repeat_n(last, usize::from(byte) - 29));
            } else {
                packet.push(byte);
            }
        }
        let checksum = String::from_utf8(vec![self.byte()?, self.byte()?]).unwrap();
        assert_eq!(checksum, format!("{sum:02x}"));
        self.send_raw(b"+");
        Some(String::from_utf8(packet).unwrap())
    }

    #[track_caller]
    pub fn ask(&mut self, packet: &str) -> String {
        self.send(packet);
        self.receive().expect("it hung up")
    }

    #[track_caller]
    pub fn ok(&mut self, packet: &str) {
        assert_eq!(self.ask(packet), "OK", "{packet}");
    }

    /// Asks with a command; what it prints.
    pub fn monitor(&mut self, command: &str) -> String {
        let mut answer = self.ask(&format!("qRcmd,{}", hex(command.as_bytes())));
        let mut text = String::new();
        while let Some(part) = answer.strip_prefix('O').filter(|_| answer != "OK") {
            text.push_str(&String::from_utf8(bytes(part)).unwrap());
            answer = self.receive().unwrap();
        }
        assert_eq!(answer, "OK");
        text
    }

    /// A register of vCPU `cpu`.
    #[track_caller]
    pub fn register(&mut self, cpu: usize, number: usize) -> u64 {
        self.ok(&format!("Hg{:x}", cpu + 1));
        let value = bytes(&self.ask(&format!("p{number:x}")));
        let mut number = [0; 8];
        number[..value.len()].copy_from_slice(&value);
        u64::from_le_bytes(number)
    }

    /// Runs on until something stops the machine.
    #[track_caller]
    pub fn go(&mut self) -> String {
        self.ask("vCont;c")
    }

    /// What is on vCPU `cpu`.
    #[track_caller]
    pub fn at(&mut self, cpu: usize) -> String {
        let text = self.ask(&format!("qThreadExtraInfo,{:x}", cpu + 1));
        String::from_utf8(bytes(&text)).unwrap()
    }

    /// Memory at an address.
    #[track_caller]
    pub fn memory(&mut self, address: u64, size: usize) -> Vec<u8> {
        let text = self.ask(&format!("m{address:x},{size:x}"));
        bytes(&text)
    }
}

/// A packet as it is sent.
pub fn framed(packet: &[u8]) -> Vec<u8> {
    let sum = packet
        .iter()
        .fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    let mut framed = vec![b'$'];
    framed.extend(packet);
    framed.extend(format!("#{sum:02x}").bytes());
    framed
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[track_caller]
pub fn bytes(hex: &str) -> Vec<u8> {
    assert!(hex.len().is_multiple_of(2), "{hex:?} is no hexadecimal");
    let digits = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16);
    (0..hex.len())
        .step_by(2)
        .map(|at| digits(at).unwrap_or_else(|_| panic!("{hex:?}")))
        .collect()
}
