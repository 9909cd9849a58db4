//! Packets on the wire.
//!
//! Purpose: cut what a client sends into packets, interrupts and acknowledgements, and wrap what goes back.
//! Invariants: memory is bounded by [`MAX_PACKET`] whatever comes in; every byte sequence is taken; a damaged packet is told apart from a
//! whole one and never passed on.
//! Elsewhere: what a packet means (`session.rs`, gdbstub).
//! Source: "Debugging with gdb", E.1 (overview), E.2 (packets), E.9 (interrupts).

/// The longest packet a client may send, in bytes between `$` and `#`.
pub(crate) const MAX_PACKET: usize = 0x4000;

/// The byte a client sends, outside any packet, to stop the machine.
const INTERRUPT: u8 = 0x03;

/// One thing a client sent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Item {
    /// The last packet arrived.
    Ack,
    /// It did not: send it again.
    Nack,
    /// Stop the machine.
    Interrupt,
    /// A packet's contents, still escaped.
    Packet(Vec<u8>),
    /// A packet whose checksum is wrong.
    Damaged,
    /// A packet longer than [`MAX_PACKET`]; its contents are gone.
    TooLong,
}

#[derive(Debug)]
enum State {
    Between,
    Body,
    TooLong,
    /// The first checksum digit is due.
    Checksum {
        too_long: bool,
    },
    /// The second one is.
    Checksum2 {
        too_long: bool,
        first: u8,
    },
}

/// Cuts bytes into [`Item`]s, however they are spread over reads.
#[derive(Debug)]
pub(crate) struct Framer {
    state: State,
    body: Vec<u8>,
}

impl Framer {
    pub(crate) fn new() -> Self {
        Self {
            state: State::Between,
            body: Vec::new(),
        }
    }

    /// Takes one byte; the item it completes, if it does.
    pub(crate) fn push(&mut self, byte: u8) -> Option<Item> {
        match self.state {
            State::Between => match byte {
                b'$' => self.start(),
                b'+' => return Some(Item::Ack),
                b'-' => return Some(Item::Nack),
                INTERRUPT => return Some(Item::Interrupt),
                _ => {}
            },
            State::Body | State::TooLong if byte == b'#' => {
                let too_long = matches!(self.state, State::TooLong);
                self.state = State::Checksum { too_long };
            }
            // Unescaped, so the packet before was cut off.
            State::Body | State::TooLong if byte == b'$' => self.start(),
            State::Body if self.body.len() < MAX_PACKET => self.body.push(byte),
            State::Body | State::TooLong => self.state = State::TooLong,
            State::Checksum { too_long } => {
                self.state = State::Checksum2 {
                    too_long,
                    first: byte,
                }
            }
            State::Checksum2 { too_long, first } => {
                self.state = State::Between;
                return Some(self.finish(too_long, first, byte));
            }
        }
        None
    }

    fn start(&mut self) {
        self.body.clear();
        self.state = State::Body;
    }

    fn finish(&mut self, too_long: bool, first: u8, second: u8) -> Item {
        if too_long {
            return Item::TooLong;
        }
        let digit = |byte: u8| char::from(byte).to_digit(16);
        match (digit(first), digit(second)) {
            (Some(high), Some(low)) if u32::from(checksum(&self.body)) == high << 4 | low => {
                Item::Packet(std::mem::take(&mut self.body))
            }
            _ => Item::Damaged,
        }
    }
}

fn checksum(body: &[u8]) -> u8 {
    body.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// `body` as a packet. It must hold no `#`, `$` or `}` that is not meant as such.
pub(crate) fn packet(body: &[u8]) -> Vec<u8> {
    let mut packet = Vec::with_capacity(body.len() + 4);
    packet.push(b'$');
    packet.extend_from_slice(body);
    packet.push(b'#');
    packet.extend_from_slice(format!("{:02x}", checksum(body)).as_bytes());
    packet
}

/// `text` for gdb to print, as packets that may be sent while the machine runs.
pub(crate) fn console_packets(text: &str) -> Vec<u8> {
    let mut packets = Vec::new();
    for chunk in text.as_bytes().chunks(MAX_PACKET / 4) {
        let mut body = Vec::with_capacity(1 + 2 * chunk.len());
        body.push(b'O');
        for byte in chunk {
            body.extend_from_slice(format!("{byte:02x}").as_bytes());
        }
        packets.extend(packet(&body));
    }
    packets
}

#[cfg(test)]
mod tests {
    use super::*;

    fn items(bytes: &[u8]) -> Vec<Item> {
        let mut framer = Framer::new();
        bytes.iter().filter_map(|byte| framer.push(*byte)).collect()
    }

    #[test]
    fn items_are_told_apart() {
        assert_eq!(
            items(b"+$g#67\x03-noise$g#68$g#zz"),
            [
                Item::Ack,
                Item::Packet(b"g".to_vec()),
                Item::Interrupt,
                Item::Nack,
                Item::Damaged,
                Item::Damaged,
            ]
        );
    }

    #[test]
    fn an_interrupt_byte_inside_a_packet_is_data() {
        let sent = packet(b"X0,1:\x03");
        assert_eq!(items(&sent), [Item::Packet(b"X0,1:\x03".to_vec())]);
    }

    #[test]
    fn a_packet_cut_off_by_the_next_is_dropped() {
        assert_eq!(items(b"$m0,1$g#67"), [Item::Packet(b"g".to_vec())]);
    }

    #[test]
    fn the_longest_packet_passes_and_a_longer_one_takes_no_memory() {
        let longest = vec![b'a'; MAX_PACKET];
        assert_eq!(items(&packet(&longest)), [Item::Packet(longest)]);
        let mut framer = Framer::new();
        let sent = packet(&vec![b'a'; 10 * MAX_PACKET]);
        let got: Vec<_> = sent.iter().filter_map(|byte| framer.push(*byte)).collect();
        assert_eq!(got, [Item::TooLong]);
        assert!(framer.body.capacity() <= 2 * MAX_PACKET);
    }

    #[test]
    fn console_text_is_sent_in_hex() {
        assert_eq!(console_packets("a\n"), packet(b"O610a"));
        assert!(console_packets("").is_empty());
    }
}
