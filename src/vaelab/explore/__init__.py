"""The explorer: a trained model as one page that opens anywhere.

A run goes through five steps, each of one module, and each of use without the next.

    graph     a torch module as an ONNX graph, compared with torch before anybody gets it
    export    the parts of a model as such graphs, and as files
    bundle    the graphs, test images, codes, measured numbers: a manifest and named pieces of bytes
    runtime   what executes a graph and draws in a browser, from their npm packages by name
    pack      one HTML file that opens without a server or a network, or a folder to host

`page/` holds the page itself: HTML, CSS and plain modules of JavaScript.
"""
