"""Links that must not be followed, by the reason of their refusal, and what their names resolve to."""

NAMES = {
    "private.example": ["10.1.2.3"],
    "loop.example": ["127.0.0.1"],
    "loop6.example": ["::1"],
    "half.example": ["93.184.215.14", "192.168.0.1"],
    "mapped.example": ["::ffff:10.0.0.1"],
    "metadata.example": ["169.254.169.254"],
    "nat64.example": ["64:ff9b::7f00:1"],
    "sixtofour.example": ["2002:7f00:1::"],
    "unique.example": ["fd00::1"],
    "cgnat.example": ["100.64.1.1"],
    "nonsense.example": ["not an address"],
    "localhost": ["127.0.0.1"],
    "intranet": ["172.16.0.9"],
    "azure.example": ["168.63.129.16"],
    "azure6.example": ["64:ff9b::a83f:8110"],
    "xn--bcher-kva.example": ["10.0.0.8"],
}

HOSTILE = {  # reason of the refusal -> urls
    "private address": [
        "http://127.0.0.1:{port}/x", "http://127.0.0.2:{port}/x", "http://127.0.0.1.:{port}/x",
        "http://0.0.0.0:{port}/x", "http://[::1]:{port}/x", "http://[::]:{port}/x",
        "http://[::ffff:127.0.0.1]:{port}/x", "http://[::ffff:7f00:1]:{port}/x", "http://[::127.0.0.1]:{port}/x",
        "http://[64:ff9b::127.0.0.1]:{port}/x", "http://[fe80::1]:{port}/x", "http://[fd00::1]/x",
        "http://[2002:7f00:1::]:{port}/x", "http://[ff02::1]/x", "http://169.254.169.254/latest/meta-data/",
        "http://10.0.0.1/x", "http://192.168.1.1/x", "http://172.16.0.1/x", "http://100.64.0.1/x",
        "http://198.18.0.1/x", "http://224.0.0.1/x", "http://255.255.255.255/x", "http://240.0.0.1/x",
        "http://localhost:{port}/x", "http://LOCALHOST:{port}/x", "http://localhost.:{port}/x",
        "http://loop.example:{port}/x", "http://loop6.example:{port}/x", "http://private.example/x",
        "http://half.example:{port}/x", "http://mapped.example/x", "http://metadata.example/x",
        "http://nat64.example:{port}/x", "http://sixtofour.example/x", "http://unique.example/x",
        "http://cgnat.example/x", "http://nonsense.example/x", "http://intranet/x", "https://loop.example:{port}/x",
        "http://bücher.example:{port}/x", "http://168.63.129.16/machine?comp=goalstate",
        "http://168.63.129.16:32526/vmSettings", "http://[::ffff:168.63.129.16]/x", "http://azure.example/x",
        "http://azure6.example/x", "http://①②⑦.⓪.⓪.①:{port}/x", "http://127。0。0。1:{port}/x",
    ],
    "odd host": [
        "http://127.1:{port}/x", "http://2130706433:{port}/x", "http://0x7f000001:{port}/x",
        "http://0x7f.0.0.1:{port}/x", "http://0177.0.0.1:{port}/x", "http://017700000001:{port}/x",
        "http://127.0.0.01:{port}/x", "http://0:{port}/x", "http://[fe80::1%25eth0]:{port}/x",
        "http://%31%32%37.0.0.1:{port}/x", "http:///127.0.0.1:{port}/x", "http:127.0.0.1:{port}/x", "http://",
        "http://a..b/x", "http://" + "a" * 300 + "/x",
    ],
    "credentials in the url": [
        "http://user@127.0.0.1:{port}/x", "http://user:word@public.example:{port}/x",
        "http://public.example@127.0.0.1:{port}/x",
    ],
    "bad url": [
        "http://127.0.0.1:{port}\\@public.example/x", "http://public.example\\.127.0.0.1:{port}/x",
        "http://127.0.0.1:{port}\t/x", "http://127.0.0.1:{port}/x\r\nHost: a", " http://127.0.0.1:{port}/x",
        "http://public.example:99999/x", "http://public.example:x/", "", "http://[::1",
        "http://public.example/" + "x" * 9000,
    ],
    "not http or https": [
        "//127.0.0.1:{port}/x", "file:///etc/hostname", "file://localhost/etc/hostname", "FILE:///etc/hostname",
        "ftp://127.0.0.1/x", "gopher://127.0.0.1:{port}/_GET%20/x", "data:image/png;base64,iVBORw0KGgo=",
        "jar:http://127.0.0.1/x", "dict://127.0.0.1:1/x", "unix:///var/run/docker.sock", "javascript:1", "x",
    ],
    "port not allowed": [
        "http://public.example:22/x", "http://public.example:25/x", "http://public.example:0/x",
    ],
    "name not found": [
        "http://pictures.invalid.example:{port}/x",
    ],
}  # fmt: skip
