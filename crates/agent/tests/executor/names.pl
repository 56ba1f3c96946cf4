# A name server of the outside: names.pl LOG ADDRESS HOST. It writes down each name that it is asked for.
use strict;
use warnings;
use IO::Select;
use IO::Socket::INET;

my ($log, $address, $host) = @ARGV;
open(my $asked, '>>', $log) or die "cannot open $log: $!";
$asked->autoflush(1);
chmod 0644, $log;
my ($front) = $address =~ /^(.*[.])/;
my %addresses = (
    'good.example' => [$address],
    'zero.example' => [$address],
    'a.below.example' => [$address],
    'below.example' => [$address],
    'many.example' => [map { "$front$_" } 2, 101 .. 199],
    'loop.example' => ['127.0.0.1'],
    'metadata.example' => ['169.254.169.254'],
    'host.example' => [$host],
    'mixed.example' => [$host, $address],
);
my %aliases = ('alias.example' => 'second.Example', 'second.example' => 'good.example', 'turn.example' => 'turn.example');

sub bytes_of { join('', map { chr(length) . $_ } split /[.]/, $_[0]) . "\0" }

sub answer {
    my ($query, $limit) = @_;
    my ($place, @labels) = (12);
    while (my $length = ord substr $query, $place, 1) {
        push @labels, substr $query, $place + 1, $length;
        $place += 1 + $length;
    }
    my $section = substr $query, 12, $place + 5 - 12;
    my $name = lc join '.', @labels;
    print $asked "$name\n";
    return if $name eq 'silent.example';
    my ($code, @records) = (0);
    my $ttl = $name eq 'zero.example' ? 0 : 60;
    for (1 .. 8) {
        my $alias = $aliases{$name} or last;
        push @records, [bytes_of($name), 5, 60, bytes_of($alias)];
        $name = lc $alias;
    }
    $code = 3 unless $addresses{$name} || @records;
    $code = 2 if $name eq 'broken.example';
    push @records, map { [bytes_of($name), 1, $ttl, inet_aton($_)] } @{$addresses{$name} || []};
    my $body = join '', map { $_->[0] . pack('nnNn', $_->[1], 1, $_->[2], length $_->[3]) . $_->[3] } @records;
    my $is_cut = 12 + length($section) + length($body) > $limit;
    ($body, @records) = ('') if $is_cut;
    my $id = unpack 'n', $query;
    return pack('n6', $id, 0x8180 | $code | ($is_cut ? 0x200 : 0), 1, scalar @records, 0, 0) . $section . $body;
}

my $datagrams = IO::Socket::INET->new(Proto => 'udp', LocalPort => 53) or die "cannot listen: $!";
my $calls = IO::Socket::INET->new(Proto => 'tcp', LocalPort => 53, Listen => 9, ReuseAddr => 1) or die "cannot listen: $!";
my $select = IO::Select->new($datagrams, $calls);
while (my @ready = $select->can_read) {
    for my $socket (@ready) {
        if ($socket == $datagrams) {
            my $from = $datagrams->recv(my $query, 4096) or next;
            my $answer = answer($query, 512);
            $datagrams->send($answer, 0, $from) if defined $answer;
        } else {
            my $caller = $calls->accept or next;
            next unless 2 == $caller->read(my $length, 2);
            $caller->read(my $query, unpack 'n', $length);
            my $answer = answer($query, 65535);
            # In pieces, as it may come.
            next unless defined $answer;
            my $message = pack('n', length $answer) . $answer;
            $caller->autoflush(1);
            for my $piece ($message =~ /(.{1,700})/gs) {
                print $caller $piece;
                select undef, undef, undef, 0.01;
            }
        }
    }
}
