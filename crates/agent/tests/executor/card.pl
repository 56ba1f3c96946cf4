# A guest that is nothing but its network card: it opens the tap of its name, asks who the gateway is, and sends an echo request for
# each pair of addresses, whatever they are. Arguments: TAP GATEWAY OWN FROM TO [FROM TO]…; prints a line for each pair.
use strict;
use Socket;

my ($name, $gateway, $own) = (shift, inet_aton(shift), inet_aton(shift));
my $mac = "\x02\0\0\0\0\7";
sysopen my $tap, "/dev/net/tun", 2 or die "cannot open /dev/net/tun: $!";
my $request = pack "a16 s x22", $name, 0x1002;
ioctl $tap, 0x400454ca, $request or die "cannot open the tap: $!";

sub arp { pack "n n C C n a6 a4 a6 a4", 1, 0x800, 6, 4, @_ }
sub frame { syswrite $tap, pack "a6 a6 n a*", $_[0], $mac, $_[1], $_[2] }

sub checksum {
    my $sum = 0;
    $sum += $_ for unpack "n*", $_[0];
    $sum = ($sum >> 16) + ($sum & 0xffff) while $sum >> 16;
    ~$sum & 0xffff;
}

# The next frame that is not for us to answer at once, or nothing within so many seconds.
sub next_frame {
    my $until = time + $_[0];
    while (time <= $until) {
        my $ready = "";
        vec($ready, fileno $tap, 1) = 1;
        select($ready, undef, undef, 0.1) or next;
        sysread $tap, my $bytes, 2048 or next;
        my ($from, $kind, $rest) = unpack "x6 a6 n a*", $bytes;
        return ($from, $kind, $rest) if $kind != 0x806;
        my ($what, $its_mac, $its, $wanted) = unpack "x6 n a6 a4 x6 a4", $rest;
        return ($from, $kind, $rest) if $what == 2;
        frame($from, 0x806, arp(2, $mac, $own, $its_mac, $its)) if $wanted eq $own;
    }
    return;
}

# As a guest does, again and again: what the kernel sends to a tap right after that was opened is dropped.
my ($router, $kind);
for (1 .. 20) {
    frame("\xff" x 6, 0x806, arp(1, $mac, $own, "\0" x 6, $gateway));
    ($router, $kind) = next_frame(1);
    last if defined $kind and $kind == 0x806;
}
die "the gateway does not answer" unless defined $kind and $kind == 0x806;

my $id = 0;
while (my ($from, $to) = splice @ARGV, 0, 2) {
    $id++;
    my $echo = pack "C C n n n a8", 8, 0, 0, $id, 1, "sealci";
    substr($echo, 2, 2) = pack "n", checksum($echo);
    my $head = pack "C C n n n C C n a4 a4", 0x45, 0, 20 + length $echo, $id, 0, 64, 1, 0, inet_aton($from), inet_aton($to);
    substr($head, 10, 2) = pack "n", checksum($head);
    frame($router, 0x800, $head . $echo);
    my $heard = "nothing";
    while (my ($by, $what, $rest) = next_frame(2)) {
        next if $what != 0x800 or unpack("x20 C x3 n", $rest) != 0 or unpack("x24 n", $rest) != $id;
        $heard = "an answer";
        last;
    }
    print "$heard\n";
}
